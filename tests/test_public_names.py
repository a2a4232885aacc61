"""What `import interlock` gives, and what it costs before it is used."""

from __future__ import annotations

import subprocess
import sys

import pytest

import interlock
from interlock.fleet.connecting import address_of
from interlock.fleet.launchers.rundir import coordinator_address


def test_every_public_name_is_there() -> None:
    assert set(interlock.__all__) <= set(dir(interlock))
    for name in interlock.__all__:
        assert getattr(interlock, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        interlock.nothing  # noqa: B018


def test_importing_it_imports_nothing_else() -> None:
    program = (
        "import sys, interlock; loaded = [n for n in sys.modules if n.startswith('interlock.') or n == 'msgspec']; "
        "assert not loaded, loaded; interlock.connect_blocking; "
        "heavy = {'torch', 'vllm', 'starlette', 'transformers'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_a_fleet_is_named_by_its_port_or_its_coordinators_socket() -> None:
    assert address_of(8123) == address_of("8123") == coordinator_address(8123)
    assert address_of("unix:/run/x/coordinator.sock") == "unix:/run/x/coordinator.sock"
    for wrong in ("localhost:8000", "http://localhost:8000", ""):
        with pytest.raises(ValueError, match="names no fleet"):
            address_of(wrong)
