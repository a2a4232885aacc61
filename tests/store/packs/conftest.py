"""The rig of the disk tier's tests, as fixtures."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

_SPEC = importlib.util.spec_from_file_location("pack_rig", Path(__file__).with_name("pack_rig.py"))
assert _SPEC is not None
assert _SPEC.loader is not None
pack_rig = sys.modules.setdefault("pack_rig", importlib.util.module_from_spec(_SPEC))
_SPEC.loader.exec_module(pack_rig)


@pytest.fixture
def packs() -> ModuleType:
    return pack_rig
