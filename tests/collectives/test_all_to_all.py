"""All-to-all: block r goes to rank r."""

from __future__ import annotations

import torch

from collectives.samples import ALL_DTYPES, NUMPY_DTYPES, as_bytes, between_nodes, raw
from zerompi.collectives import all_to_all


def test_all_to_all_moves_every_bit_of_every_dtype(flat, memory):
    n = 3
    own = slice(flat.rank * n, (flat.rank + 1) * n)
    for dtype in ALL_DTYPES:
        values = [raw(dtype, n * flat.size, rank) for rank in range(flat.size)]
        send, recv = memory.put(values[flat.rank]), memory.put(raw(dtype, n * flat.size, 77))
        all_to_all(send, recv, flat)
        expected = b"".join(as_bytes(part[own]) for part in values)
        assert as_bytes(memory.get(recv)) == expected, dtype
        unchanged = raw(dtype, n * flat.size, flat.rank)
        assert as_bytes(memory.get(send)) == as_bytes(unchanged), dtype


def test_all_to_all_transposes_over_every_layout(group, memory):
    send = torch.arange(group.size) + 10 * group.rank
    recv = memory.put(torch.empty_like(send))
    all_to_all(memory.put(send), recv, group)
    assert memory.get(recv).tolist() == [10 * rank + group.rank for rank in range(group.size)]


def test_all_to_all_takes_arrays(flat, xp):
    for code in NUMPY_DTYPES:
        send = xp.full((flat.size, 2), flat.rank, dtype=code)
        recv = xp.empty((flat.size, 2), dtype=code)
        all_to_all(send, recv, flat)
        expected = xp.repeat(xp.arange(flat.size), 2).reshape(flat.size, 2).astype(code)
        xp.testing.assert_array_equal(recv, expected, err_msg=code)


def test_all_to_all_of_nothing_sends_nothing(group, memory):
    all_to_all(memory.put(torch.empty(0)), memory.put(torch.empty(0, 2)), group)
    assert group.traffic.total("all_to_all") == 0


def test_all_to_all_sends_each_block_once(group, memory):
    send, recv = torch.zeros(5 * group.size), torch.zeros(5 * group.size)
    all_to_all(memory.put(send), memory.put(recv), group)
    assert group.traffic.total("all_to_all") == (group.size - 1) * 5 * 4
    others = sum(not group.topology.same_node(group.rank, peer) for peer in range(group.size))
    assert between_nodes(group, "all_to_all") == others * 5 * 4
