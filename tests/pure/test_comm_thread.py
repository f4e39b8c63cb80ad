"""The queue of the communication thread: order, errors, and what comes behind an error."""

from __future__ import annotations

import threading
import time

import pytest
from mpi4py import MPI

from zerompi.activity import computes_beside
from zerompi.comm_thread import CommThread


@pytest.fixture(params=[True, False], ids=["thread", "caller"])
def thread(request):
    made = CommThread(is_wanted=request.param)
    yield made
    made.close()


@pytest.fixture
def real_thread():
    """One that works beside its caller."""
    made = CommThread(is_wanted=True)
    if not made.overlaps:
        pytest.skip("no thread")
    yield made
    made.close()


def test_the_switch_counts_for_each_thread_anew(monkeypatch):
    overlaps = []
    for value in ("0", "1", "0"):
        monkeypatch.setenv("ZEROMPI_COMM_THREAD", value)
        thread = CommThread(is_wanted=True)
        overlaps.append(thread.overlaps)
        thread.close()
    assert overlaps == [False, MPI.Query_thread() >= MPI.THREAD_MULTIPLE, False]


def test_work_is_done_in_the_order_of_submission(thread):
    done = []
    for number in range(50):
        thread.submit(lambda number=number: done.append(number))
    thread.run(lambda: done.append(50))
    assert done == list(range(51))


def fail():
    raise KeyError("a bug")


def test_an_error_is_raised_once_and_cancels_what_comes_behind_it(real_thread):
    gate, done = threading.Event(), []
    real_thread.submit(gate.wait)
    failed = real_thread.submit(fail)
    behind = real_thread.submit(lambda: done.append("behind"))
    gate.set()
    failed.abandon()  # ends after the queue is broken
    later = real_thread.submit(lambda: done.append("later"))
    with pytest.raises(KeyError):
        behind.wait()
    assert later.is_done
    real_thread.drain()  # the error was raised
    real_thread.submit(lambda: done.append("anew"))
    real_thread.drain()
    assert done == ["anew"]


@pytest.mark.parametrize("work", [lambda: None, fail])
def test_what_is_to_be_done_when_idle_comes_after_the_queue_however_that_ends(real_thread, work):
    gate, done = threading.Event(), []
    real_thread.submit(gate.wait)
    last = real_thread.submit(work)
    real_thread.when_idle(lambda: done.append("then"))
    assert done == []
    gate.set()
    last.abandon()
    assert done == ["then"]
    real_thread.when_idle(lambda: done.append("at once"))
    assert done == ["then", "at once"]


def test_the_end_of_the_queue_raises_what_went_wrong(thread):
    with pytest.raises(KeyError):
        thread.submit(fail)
        thread.drain()
    thread.drain()


def test_close_finishes_what_was_submitted(thread):
    done = []
    thread.submit(lambda: done.append(1))
    thread.close()
    assert done == [1]


class Announced:
    """An agreement that notes what becomes of it."""

    def __init__(self, name, events):
        self._name, self._events = name, events

    def begin(self):
        self._events.append(f"begin {self._name}")
        return True

    def cancel(self):
        self._events.append(f"cancel {self._name}")


def test_work_is_announced_unless_what_comes_before_it_is_not(real_thread):
    gate, events = threading.Event(), []
    real_thread.submit(gate.wait, [Announced("a", events)])
    real_thread.submit(lambda: None, [Announced("b", events), Announced("c", events)])
    real_thread.submit(lambda: None)
    real_thread.submit(lambda: None, [Announced("d", events)])
    assert events == ["begin a", "begin b", "begin c"]
    gate.set()
    real_thread.drain()
    real_thread.submit(lambda: None, [Announced("e", events)])
    real_thread.drain()
    assert events[3:] == ["begin e"]


def test_what_was_announced_is_cancelled_by_an_error(real_thread):
    gate, events = threading.Event(), []
    real_thread.submit(gate.wait)
    failed = real_thread.submit(fail, [Announced("a", events)])
    real_thread.submit(lambda: None, [Announced("b", events)])
    gate.set()
    with pytest.raises(KeyError):
        failed.wait()
    assert events == ["cancel a", "cancel b"]
    real_thread.submit(lambda: None, [Announced("c", events)])
    real_thread.drain()
    assert events[2:] == ["begin c"]


def test_who_waits_for_it_does_not_compute(real_thread):
    begun, may_end, seen = threading.Event(), threading.Event(), []

    def look():
        begun.set()
        may_end.wait(10)
        seen.append(computes_beside())

    ticket = real_thread.submit(look)
    begun.wait(10)
    may_end.set()
    while not ticket.is_done:  # without waiting for it
        pass
    assert seen == [True]

    def fail():
        deadline = time.monotonic() + 10
        while computes_beside() and time.monotonic() < deadline:
            pass
        seen.append(computes_beside())
        raise ValueError("after that")

    with pytest.raises(ValueError, match="after that"):
        real_thread.submit(fail).wait()
    assert seen == [True, False]
    real_thread.submit(look)
    real_thread.drain()
    ticket = real_thread.submit(look)
    while not ticket.is_done:
        pass
    assert seen[-1] is True  # the error has left nothing behind
