"""Options and fixtures that all tests share."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable

import pytest
from hypothesis import settings

# A busy machine is no failure; pytest's own timeout bounds each test.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--no-skips",
        action="store_true",
        help="a skipped test fails the run (CI: nothing is left out in silence)",
    )


class NoSkips:
    """Counts skips and turns a green run with any into a failed one."""

    def __init__(self) -> None:
        self.skipped: list[str] = []

    @pytest.hookimpl
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.skipped and not hasattr(report, "wasxfail"):
            self.skipped.append(report.nodeid)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.skipped and session.exitstatus == 0:
            print("\nskipped, which --no-skips forbids:", *self.skipped, sep="\n  ")
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--no-skips"):
        config.pluginmanager.register(NoSkips(), "interlock-no-skips")


@pytest.fixture
def descriptors() -> Callable[[], set[str]]:
    """The descriptors open in this process, once what earlier tests left to the garbage collector is closed."""

    def opened() -> set[str]:
        gc.collect()
        return set(os.listdir("/proc/self/fd"))

    return opened
