"""Children, their whole trees, and proof that they are gone."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from interlock.host.processes import PARENT_FD, list_processes, open_parent_pipe, parent_gone
from interlock.host.real import RealHost
from interlock.host.watch import ProcessWatch


def alive(pid: int) -> bool:
    return any(e.pid == pid and e.state not in "ZX" for e in list_processes())


async def test_a_childs_end_is_told_as_status_or_signal(children: Any) -> None:
    child, said = await children.start("sys.exit(3)")
    assert await child.wait() == child.returncode == 3
    child, said = await children.start("os.write(SAY, b'up\\n'); time.sleep(600)")
    await children.line(said)
    assert child.returncode is None
    child.terminate()
    assert await child.wait() == -signal.SIGTERM
    assert not Path(f"/proc/{child.pid}").exists()
    child.terminate()


async def test_output_goes_to_the_log_and_descriptors_are_passed(host: RealHost, tmp_path: Path) -> None:
    reader, writer = os.pipe()
    program = f"import os; print('out'); os.write({writer}, b'passed')"
    child = await host.spawn(
        [sys.executable, "-c", program], env=dict(os.environ), log=tmp_path / "log", pass_fds=[writer]
    )
    os.close(writer)
    assert await child.wait() == 0
    assert (tmp_path / "log").read_text() == "out\n"
    assert os.read(reader, 100) == b"passed"
    os.close(reader)


DAEMON = """
# leave(how): one descendant that left our session; how much of a trace it leaves is the argument's choice
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.write(SAY, f"{os.getpid()}\\n".encode())
        time.sleep(600)
    if "orphan" in sys.argv:
        os._exit(0)
    time.sleep(600)
if "leave" in sys.argv:
    sys.exit(0)
time.sleep(600)
"""


HEADLESS = """
# Its first thread has ended, which /proc shows as a zombie, while another one runs on.
import ctypes, platform, threading
def run_on():
    while open(f"/proc/{os.getpid()}/stat").read().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.001)
    os.write(SAY, f"{os.getpid()}\\n".encode())
    time.sleep(600)
if "orphan" in sys.argv and os.fork() != 0:
    os._exit(0)
if "orphan" in sys.argv:
    os.setsid()
threading.Thread(target=run_on).start()
ctypes.CDLL(None).syscall({"x86_64": 60, "aarch64": 93}[platform.machine()], 0)
"""


@pytest.mark.parametrize("how", [[], ["orphan", "leave"]], ids="-".join)
async def test_end_tree_ends_a_process_whose_first_thread_has_ended(children: Any, how: list[str]) -> None:
    child, said = await children.start(HEADLESS, *how)
    headless = int(await children.line(said))
    watch = children.host.watch(headless)
    assert not watch.exited
    assert await child.end_tree(10)
    assert watch.exited
    watch.close()


@pytest.mark.parametrize("how", [[], ["orphan"], ["orphan", "leave"]], ids="-".join)
async def test_end_tree_ends_a_grandchild_that_called_setsid(children: Any, how: list[str]) -> None:
    child, said = await children.start(DAEMON, *how)
    grandchild = int(await children.line(said))
    if "leave" in how:
        assert await child.wait() == 0
        assert Path(f"/proc/{child.pid}").exists(), (
            "not reaped: its number must stay ours while its tree lives"
        )
    assert alive(grandchild)
    assert await child.end_tree(10)
    assert not alive(grandchild)
    assert not Path(f"/proc/{child.pid}").exists()
    assert await child.end_tree(1), "ending it again is nothing"


async def test_end_tree_ends_what_cleaned_its_environment_or_is_stopped(children: Any) -> None:
    cleaned = "os.setsid(); os.execve(sys.executable, [sys.executable, '-c', f\"import os, time; os.write({SAY}, b'%d\\\\n' % os.getpid()); time.sleep(600)\"], {})"
    program = f"os.set_inheritable(SAY, True)\nif os.fork() == 0: {cleaned}\ntime.sleep(600)"
    child, said = await children.start(program)
    grandchild = int(await children.line(said))
    os.kill(grandchild, signal.SIGSTOP)
    os.kill(child.pid, signal.SIGSTOP)
    assert await child.end_tree(10)
    assert not alive(grandchild)


async def test_end_tree_leaves_other_children_alone(children: Any) -> None:
    one, said_one = await children.start("os.write(SAY, b'up\\n'); time.sleep(600)")
    two, said_two = await children.start("os.write(SAY, b'up\\n'); time.sleep(600)")
    await children.line(said_one)
    await children.line(said_two)
    assert await one.end_tree(10)
    assert one.returncode == -signal.SIGKILL
    assert two.returncode is None
    assert alive(two.pid)


SUBREAPER = """
import asyncio, os, sys
from interlock.host.processes import become_subreaper, list_processes
from interlock.host.real import RealHost
from interlock.host.watch import ProcessWatch
async def main():
    become_subreaper()
    host = RealHost()
    reader, writer = os.pipe()
    program = f"import os, sys, time, signal\\nSAY = {writer}\\n" + sys.argv[1]
    child = await host.spawn([sys.executable, "-c", program, "orphan", "leave"], env=dict(os.environ), log=None, pass_fds=[writer])
    os.close(writer)
    grandchild = int(os.read(reader, 100))
    await child.wait()
    adopted = any(e.pid == grandchild and e.parent == os.getpid() for e in list_processes())
    gone = await child.end_tree(10)
    left = [e for e in list_processes() if e.parent == os.getpid()]
    print(adopted, gone, left)
asyncio.run(main())
"""


@pytest.mark.parametrize("program", [DAEMON, HEADLESS], ids=["daemon", "headless"])
def test_a_subreaper_adopts_orphans_and_leaves_no_zombie_of_them(program: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SUBREAPER, program], capture_output=True, text=True, timeout=40, check=False
    )
    assert done.stdout.split(maxsplit=2) == ["True", "True", "[]\n"], done.stderr


async def test_end_tree_says_when_it_could_not_prove_the_end(
    children: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    child, said = await children.start("os.write(SAY, b'up\\n'); time.sleep(600)")
    await children.line(said)
    with monkeypatch.context() as patched:
        patched.setattr(ProcessWatch, "kill", lambda self: None)
        assert not await child.end_tree(0.2)
    assert alive(child.pid)
    assert await child.end_tree(10)


async def test_a_watch_tells_every_waiter_and_kills_exactly_its_process(
    host: RealHost, children: Any
) -> None:
    child, said = await children.start("os.write(SAY, b'up\\n'); time.sleep(600)")
    await children.line(said)
    watch = host.watch(child.pid)
    waiters = [asyncio.create_task(watch.wait_exited()) for _ in range(3)]
    await asyncio.sleep(0)
    waiters[0].cancel()
    assert not watch.exited
    watch.kill()
    async with asyncio.timeout(20):
        await asyncio.gather(*waiters[1:])
    assert watch.exited
    assert await child.wait() == -signal.SIGKILL
    watch.kill()
    watch.close()
    watch.close()
    with pytest.raises(ProcessLookupError):
        host.watch(child.pid)


async def test_closing_a_watch_wakes_its_waiters(host: RealHost) -> None:
    watch = host.watch(os.getpid())
    waiter = asyncio.create_task(watch.wait_exited())
    await asyncio.sleep(0)
    watch.close()
    with pytest.raises(ConnectionAbortedError):
        await waiter


async def test_the_end_of_the_parents_pipe_is_the_end_of_the_parent() -> None:
    reader, writer = open_parent_pipe()
    waiting = asyncio.create_task(parent_gone({PARENT_FD: str(reader)}))
    os.write(writer, b"a byte is no end")
    for _ in range(5):
        await asyncio.sleep(0)
    assert not waiting.done()
    os.close(writer)
    await asyncio.wait_for(waiting, 10)
    os.close(reader)


async def test_without_a_parents_pipe_nobody_is_waited_for_and_a_wrong_one_is_named() -> None:
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(parent_gone({}), 0.01)
    for wrong in ("soon", "99999"):
        with pytest.raises(ValueError, match=wrong):
            await parent_gone({PARENT_FD: wrong})


async def test_a_child_leaves_when_its_parent_is_killed(children: Any) -> None:
    supervisor = """
reader, writer = os.pipe()
os.set_inheritable(reader, True)
program = "import asyncio; from interlock.host.processes import parent_gone; asyncio.run(parent_gone())"
env = {**os.environ, "INTERLOCK_PARENT_FD": str(reader)}
pid = os.posix_spawn(sys.executable, [sys.executable, "-c", program], env)
os.write(SAY, f"{pid}\\n".encode())
time.sleep(600)
"""
    child, said = await children.start(supervisor)
    pid = int(await children.line(said))
    watch = children.host.watch(pid)
    os.kill(child.pid, signal.SIGKILL)
    async with asyncio.timeout(20):
        await watch.wait_exited()
    assert watch.exited
    watch.close()
