"""The worker thread: in order, bounded, ended within a deadline."""

from __future__ import annotations

import threading

import pytest

from interlock.host.threads import Worker, WorkerBusyError


def test_work_is_done_in_order_and_errors_are_the_callers() -> None:
    worker, done = Worker("test", 10), []
    futures = [worker.submit(done.append, i) for i in range(5)]
    failed = worker.submit(lambda: 1 / 0)
    answer = worker.submit(threading.current_thread)
    assert answer.result(10).name == "test"
    assert done == [0, 1, 2, 3, 4]
    assert all(f.done() for f in futures)
    with pytest.raises(ZeroDivisionError):
        failed.result(10)
    assert worker.close(10)


def test_a_full_or_closed_worker_refuses_at_once() -> None:
    worker, begun, go = Worker("test", 1), threading.Event(), threading.Event()

    def block() -> bool:
        begun.set()
        return go.wait(20)

    running = worker.submit(block)
    assert begun.wait(20)
    waiting = worker.submit(int)
    with pytest.raises(WorkerBusyError, match="1 jobs"):
        worker.submit(int)
    assert not worker.close(0.05), "it hangs in its job, and says so"
    assert waiting.cancelled()
    with pytest.raises(WorkerBusyError, match="closed"):
        worker.submit(int)
    go.set()
    assert running.result(20) is True
    assert worker.close(20)


def test_closing_does_first_what_was_taken() -> None:
    worker, done = Worker("test", 10), []
    for i in range(5):
        worker.submit(done.append, i)
    assert worker.close(20)
    assert done == [0, 1, 2, 3, 4]
