"""How often a rank looks for messages while it waits."""

from __future__ import annotations

import threading

import pytest

from zerompi.activity import idle
from zerompi.collectives import waiting


class Clock:
    """Time that passes only in sleep."""

    def __init__(self):
        self.now = 0.0
        self.sleeps = []

    def perf_counter(self):
        return self.now

    def sleep(self, seconds):
        self.sleeps.append(seconds)
        self.now += seconds


class Late:
    """Stands for MPI.Request: messages that have come at some time."""

    def __init__(self, clock, at):
        self.clock, self.at = clock, at

    def Testall(self, requests):  # noqa: N802  (MPI's name)
        return self.clock.now >= self.at


@pytest.fixture
def longest_sleep(monkeypatch):
    """The longest sleep of a wait of 0.1 seconds."""

    def measure():
        clock = Clock()
        monkeypatch.setattr(waiting, "time", clock)
        monkeypatch.setattr(waiting.MPI, "Request", Late(clock, 0.1))
        waiting.wait_all([], polls=False)
        return max(clock.sleeps)

    return measure


def in_another_thread(function):
    results = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join()
    return results[0]


def test_rank_that_computes_nothing_looks_more_often(longest_sleep):
    beside = in_another_thread(longest_sleep)
    assert longest_sleep() < beside / 5
    with idle():
        assert in_another_thread(longest_sleep) == longest_sleep()
    assert in_another_thread(longest_sleep) == beside


def test_who_waits_in_another_thread_does_not_count(longest_sleep):
    def measure():
        with idle():
            return longest_sleep()

    assert in_another_thread(measure) == in_another_thread(longest_sleep)


class Ranks:
    """Stands for the ranks of a node, bound to these cores each."""

    def __init__(self, *masks):
        self.masks = masks

    def allgather(self, own):
        return list(map(frozenset, self.masks))

    def allreduce(self, own):
        return own * len(self.masks)


@pytest.mark.parametrize(
    ("masks", "cores", "has_spare"),
    [
        ([{0}, {1}], 2, False),  # a core for each, and none for those who wait
        ([{0, 1}, {2, 3}], 4, True),
        ([{0, 1}, {0, 1}], 2, False),
        ([{0, 1, 2, 3}] * 2, 4, True),
        ([{0, 1, 2}, {2, 3}], 4, True),
    ],
)
def test_ranks_that_are_bound_have_the_cores_of_all(masks, cores, has_spare, monkeypatch):
    monkeypatch.setattr(waiting.torch, "get_num_threads", lambda: 1)
    assert waiting.num_node_cores(Ranks(*masks)) == cores
    assert waiting.has_spare_cores(Ranks(*masks)) == has_spare
