"""Broadcast and reduce: from the root to all, from all to the root."""

from __future__ import annotations

import torch

from collectives.samples import ALL_DTYPES, NUMPY_DTYPES, as_bytes, documented_sum, numbers, raw
from zerompi.collectives import broadcast
from zerompi.collectives.reduce import reduce_to_root

LARGE = 20_001  # float32: more than what the root sends to everyone by itself


def test_broadcast_moves_every_bit_of_every_dtype(flat, memory):
    root = flat.size - 1
    for dtype in ALL_DTYPES:
        recv = memory.put(raw(dtype, 5, 77))
        broadcast(memory.put(raw(dtype, 5, flat.rank)), recv, flat, root=root)
        assert as_bytes(memory.get(recv)) == as_bytes(raw(dtype, 5, root)), dtype


def test_broadcast_from_every_root(group, memory):
    for numel in (1, 7, LARGE):
        for root in range(group.size):
            recv = memory.put(torch.full((numel,), -1.0))
            send = memory.put(numbers(torch.float32, numel, group.rank))
            broadcast(send, recv, group, root=root)
            expected = numbers(torch.float32, numel, root)
            assert torch.equal(memory.get(recv), expected), (numel, root)


def test_broadcast_in_place(group, memory):
    for numel in (3, LARGE):
        own = memory.put(numbers(torch.float32, numel, group.rank))
        broadcast(own, own, group)
        assert torch.equal(memory.get(own), numbers(torch.float32, numel, 0)), numel


def test_broadcast_takes_arrays(flat, xp):
    for code in NUMPY_DTYPES:
        send = xp.full((2, 3), flat.rank + 1, dtype=code)
        recv = xp.zeros((2, 3), dtype=code)
        broadcast(send, recv, flat)
        xp.testing.assert_array_equal(recv, xp.ones((2, 3), dtype=code), err_msg=code)


def test_broadcast_of_a_scalar(group, memory):
    recv = memory.put(torch.tensor(-1))
    broadcast(memory.put(torch.tensor(group.rank + 5)), recv, group)
    assert memory.get(recv).item() == 5


def test_broadcast_of_nothing_sends_nothing(group, memory):
    broadcast(memory.put(torch.empty(0)), memory.put(torch.empty(0)), group)
    assert group.traffic.total("broadcast") == 0


def test_only_the_root_sends_a_small_broadcast(group, memory):
    broadcast(memory.put(torch.zeros(10)), memory.put(torch.zeros(10)), group)
    expected = (group.size - 1) * 40 if group.rank == 0 else 0
    assert group.traffic.total("broadcast") == expected


def test_a_large_broadcast_is_a_scatter_and_an_all_gather(flat, memory):
    numel, size = 10_000 * flat.size, flat.size
    full = memory.put(torch.zeros(numel, dtype=torch.float64))
    broadcast(full, full, flat)
    block = full.nbytes // size
    scattered = (size - 1) * block if flat.rank == 0 else 0
    gathered = (size - 1) * block
    assert flat.traffic.total("broadcast") == scattered + gathered


def test_reduce_brings_the_documented_sum_to_the_root(group, memory):
    for numel in (0, 1, 7, LARGE):
        values = [numbers(torch.float32, numel, rank) for rank in range(group.size)]
        for root in range(group.size):
            own = memory.put_tensor(values[group.rank].clone())
            reduce_to_root(own, group, root)
            if group.rank == root:
                expected = documented_sum(values, group)
                assert torch.equal(memory.get(own), expected), (numel, root)
