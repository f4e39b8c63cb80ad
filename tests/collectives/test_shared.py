"""Shared memory of a node: fences, windows, and what lies where it cannot be read."""

from __future__ import annotations

import random
import time

import numpy as np
import pytest
import torch

import zerompi
from harness.memory import ON_DEVICE
from zerompi.collectives import Group, all_reduce, reduce_scatter
from zerompi.collectives import shared as shared_module
from zerompi.collectives.reduce_scatter import reduce_blocks
from zerompi.collectives.shared import Window

pytestmark = pytest.mark.skipif(ON_DEVICE, reason="about memory of the host that ranks share")


@pytest.fixture
def node(comm):
    """The shared memory of all ranks as one node."""
    if comm.size == 1:
        pytest.skip("needs another rank")
    group = Group(comm, zerompi.Topology(comm, comm.size))
    if group.node is None:
        group.close()
        pytest.skip("no shared memory")
    yield group.node
    group.close()


def delays(rank, count, longest):
    """Seconds to sleep before each of `count` steps: on random ranks, now and then."""
    source = random.Random(100 + rank)
    return [longest * source.random() if source.random() < 0.2 else 0.0 for _ in range(count)]


def test_a_fence_makes_what_came_before_it_readable(node):
    window = Window(node.comm, [8] * node.comm.size)
    values = [part.view(torch.int64) for part in window.parts(0, 8, torch.uint8)]
    for step, delay in enumerate(delays(node.comm.rank, 300, 0.005)):
        time.sleep(delay)
        values[node.comm.rank].fill_(step)
        node.fence.cross()
        assert [int(value) for value in values] == [step] * node.comm.size
        node.fence.cross()
    del values
    window.close()


def test_headers_arrive_whatever_the_ranks_delays(node):
    for step, delay in enumerate(delays(node.comm.rank, 300, 0.002)):
        time.sleep(delay)
        number = node.fence.arrive(step, 1000 * step + node.comm.rank)
        node.fence.wait(number)
        expected = [(step, 1000 * step + rank) for rank in range(node.comm.size)]
        assert node.fence.headers(number) == expected


def test_memory_is_written_again_only_when_all_have_finished(node):
    rank = node.comm.rank
    window = Window(node.comm, [8] * node.comm.size)
    values = [part.view(torch.int64) for part in window.parts(0, 8, torch.uint8)]
    number = 0
    for step, delay in enumerate(delays(rank, 200, 0.005)):
        node.fence.wait_finished(number)
        values[rank].fill_(step)
        number = node.fence.cross()
        time.sleep(delay)
        assert [int(value) for value in values] == [step] * node.comm.size
        node.fence.finish(number)
    del values
    window.close()


def test_counters_may_wrap_around(node):
    node.fence.cross()
    start = (1 << 32) - 20
    node.comm.Barrier()
    node.fence.count = start
    node.fence.arrive()
    node.comm.Barrier()
    for _ in range(60):
        number = node.fence.cross()
        node.fence.finish(number)
        node.fence.wait_finished(number)
    assert number == start + 61


def test_a_waiting_rank_takes_no_core(node):
    if node.comm.rank == 0:
        time.sleep(0.5)
    before = time.process_time()
    node.fence.cross()
    assert time.process_time() - before < 0.25


def test_a_window_stays_while_a_tensor_lies_in_it(node):
    window = Window(node.comm, [4096] * node.comm.size)
    kept = window.parts(0, 10, torch.float32)[node.comm.rank]
    kept.fill_(node.comm.rank)
    if node.comm.rank:
        del kept
    window.close()
    if node.comm.rank == 0:
        assert kept.tolist() == [0.0] * 10  # would end the process if it were freed


def test_large_windows_take_no_memory_before_they_are_touched(node):
    nbytes = 1 << 33
    if not shared_module.has_room(nbytes * node.comm.size):
        pytest.skip("needs address space in /dev/shm")
    window = Window(node.comm, [nbytes] * node.comm.size)
    last = window.parts(nbytes - 4, 1, torch.float32)
    last[node.comm.rank].fill_(node.comm.rank)
    node.fence.cross()
    assert [float(value) for value in last] == list(range(node.comm.size))
    node.fence.cross()
    del last
    window.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_the_sum_out_of_the_peers_memory_is_that_of_messages(comm, monkeypatch, dtype):
    values = [(torch.arange(4001) * (rank + 3) % 17).to(dtype) for rank in range(comm.size)]
    results = []
    for switch in ("1", "0"):
        monkeypatch.setenv("ZEROMPI_SHARED_MEMORY", switch)
        group = Group(comm, zerompi.Topology(comm, comm.size))
        ranges = [(1000 * r, 1000 * r + 1000) for r in range(comm.size)]
        full = values[comm.rank]
        peers = None
        if group.node is not None:
            window = Window(group.node.comm, [full.nbytes] * comm.size)
            peers = window.parts(0, full.numel(), dtype)
            peers[comm.rank].copy_(full)
            full = peers[comm.rank]
        out = torch.empty(1000, dtype=dtype)
        reduce_blocks(full, out, ranges, group, peers=peers)
        results.append(out)
        if group.node is not None:
            del full, peers
            window.close()
        group.close()
    assert torch.equal(*results)


def test_without_room_messages_are_sent(comm, monkeypatch):
    monkeypatch.setattr(shared_module, "has_room", lambda nbytes: comm.rank != 0)
    group = Group(comm, zerompi.Topology(comm, comm.size))
    assert group.node is None
    own = torch.ones(5)
    all_reduce(own, own, group)
    assert own.tolist() == [comm.size] * 5
    group.close()


def test_staging_memory_serves_arrays_of_any_size(node, comm, monkeypatch):
    monkeypatch.setattr("zerompi.collectives.staging.STAGING_NBYTES", 4096)
    group = Group(comm, zerompi.Topology(comm, comm.size))
    for numel in (1, 63, 1000, 5000):
        send = np.arange(numel * comm.size, dtype=np.float64) + comm.rank
        recv = np.empty(numel)
        reduce_scatter(send, recv, group)
        start = comm.rank * numel
        expected = comm.size * send[start : start + numel]
        expected += sum(range(comm.size)) - comm.size * comm.rank
        assert np.array_equal(recv, expected)
    group.close()
