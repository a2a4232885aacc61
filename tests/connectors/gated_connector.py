"""The connector with each rank on a socket of its own, where a test's gate sits; the scheduler goes to the node directly."""

from __future__ import annotations

import msgspec

from interlock.connectors.vllm.connector import InterlockConnector
from interlock.store.client import StoreClient


class GatedConnector(InterlockConnector):
    def _client(self, rank: int | None) -> StoreClient:
        if rank is not None:
            self.config = msgspec.structs.replace(self.config, store=f"{self.config.store}.rank{rank}")
        return super()._client(rank)
