"""The connector for vLLM: `kv_connector="InterlockConnector", kv_connector_module_path="interlock.connectors.vllm"`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from interlock.connectors.vllm.connector import InterlockConnector

__all__ = ["InterlockConnector"]


def __getattr__(name: str) -> Any:
    """vLLM is imported when vLLM asks for the class, so that the parts without it can be used without."""
    if name == "InterlockConnector":
        from interlock.connectors.vllm.connector import InterlockConnector

        return InterlockConnector
    raise AttributeError(f"{__name__} has no {name}")
