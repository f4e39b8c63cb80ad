"""All-gather: values, dtypes, shapes, in-place form, uneven blocks, bytes sent."""

from __future__ import annotations

import numpy as np
import torch

from collectives.samples import (
    ALL_DTYPES,
    NUMPY_DTYPES,
    as_bytes,
    between_nodes,
    raw,
    reads_neighbours,
)
from zerompi.collectives import all_gather
from zerompi.collectives.all_gather import gather_blocks
from zerompi.traffic import INTRA_NODE


def test_all_gather_moves_every_bit_of_every_dtype(group, memory):
    for dtype in ALL_DTYPES:
        send = memory.put(raw(dtype, 5, group.rank))
        recv = memory.put(raw(dtype, 5 * group.size, 77))
        all_gather(send, recv, group)
        expected = b"".join(as_bytes(raw(dtype, 5, rank)) for rank in range(group.size))
        assert as_bytes(memory.get(recv)) == expected, dtype
        assert as_bytes(memory.get(send)) == as_bytes(raw(dtype, 5, group.rank)), dtype


def test_all_gather_takes_arrays(flat, xp):
    for code in NUMPY_DTYPES:
        own = xp.arange(6).reshape(2, 3).astype(code) + xp.ones((), code)
        recv = xp.zeros((flat.size, 2, 3), dtype=code)
        all_gather(own, recv, flat)
        xp.testing.assert_array_equal(recv, xp.stack([own] * flat.size), err_msg=code)


def test_all_gather_takes_an_array_and_a_tensor_together(group, memory, xp):
    send = xp.full(4, group.rank, dtype=xp.float32)
    recv = memory.put_tensor(torch.empty(group.size, 4))
    all_gather(send, recv, group)
    assert memory.get(recv)[:, 0].tolist() == list(range(group.size))


def test_all_gather_in_place_reads_its_own_block(group, memory):
    recv = memory.put(torch.full((group.size, 3), -1))
    recv[group.rank] = group.rank
    all_gather(recv[group.rank], recv, group)
    assert memory.get(recv).tolist() == [[rank] * 3 for rank in range(group.size)]


def test_all_gather_of_a_scalar(group, memory):
    recv = memory.put(torch.empty(group.size, dtype=torch.int64))
    all_gather(memory.put(torch.tensor(group.rank)), recv, group)
    assert memory.get(recv).tolist() == list(range(group.size))


def test_all_gather_of_nothing_sends_nothing(group, memory):
    for shape in ((0,), (3, 0), (0, 2)):
        full = torch.empty(group.size, *shape)
        all_gather(memory.put(torch.empty(shape)), memory.put(full), group)
        assert group.traffic.total("all_gather") == 0, shape


def test_all_gather_reads_a_read_only_array_without_a_warning(flat, recwarn):
    send = np.full(3, flat.rank)
    send.flags.writeable = False
    recv = np.empty(3 * flat.size, dtype=send.dtype)
    all_gather(send, recv, flat)
    np.testing.assert_array_equal(recv, np.repeat(np.arange(flat.size), 3))
    assert not send.flags.writeable
    assert not recwarn.list


def test_gather_blocks_takes_blocks_of_any_length(group, memory):
    for lengths in ([3, 0, 5, 1], [0, 0, 0, 7], [4, 4, 4, 4], [0, 0, 0, 0]):
        stops = np.cumsum(lengths[: group.size]).tolist()
        starts = [0, *stops[:-1]]
        ranges = list(zip(starts, stops, strict=True))
        full = torch.full((stops[-1] + 2,), -1.0)
        full[slice(*ranges[group.rank])] = group.rank
        flat = memory.put_tensor(full)
        gather_blocks(flat, ranges, group)
        owners = [rank for rank in range(group.size) for _ in range(lengths[rank])]
        assert memory.get(flat).tolist() == [*owners, -1, -1], lengths


def test_all_gather_enters_each_other_node_once(group, memory):
    numel = 10
    send, recv = torch.zeros(numel), torch.zeros(numel * group.size)
    all_gather(memory.put(send), memory.put(recv), group)
    topology, rank = group.topology, group.rank
    node = topology.node_of[rank]
    neighbours = len(topology.ranks_of_node[node]) - 1
    own = topology.group_of(rank)
    entering = sum(
        topology.group_of(owner) != own and topology.group_delegate(own, owner) == rank
        for owner in range(group.size)
    )
    # Once to each other group; what has entered this one so, and the own block, to its other nodes.
    once_each = topology.num_groups - 1
    once_each += (1 + entering) * (len(topology.nodes_of_group[own]) - 1)
    if reads_neighbours(group):  # counted where it is read
        handled = sum(topology.delegate(node, owner) == rank for owner in range(group.size))
        inter, intra = once_each, group.size - handled
    elif group.algorithm == "flat":
        inter, intra = group.size - 1 - neighbours, neighbours
    else:
        inter = once_each
        handled = sum(topology.delegate(node, owner) == rank for owner in range(group.size))
        intra = handled * neighbours
    assert between_nodes(group, "all_gather") == inter * numel * 4
    total = group.comm.allreduce(inter)
    if group.algorithm != "flat":
        assert total == group.size * (topology.num_nodes - 1)
    assert group.traffic.total("all_gather", INTRA_NODE) == intra * numel * 4
