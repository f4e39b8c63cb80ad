"""Reduce-scatter: the order and the dtype of the sum, in-place form, uneven blocks, bytes sent."""

from __future__ import annotations

from importlib import import_module

import numpy as np
import pytest
import torch

from collectives.samples import (
    NUMPY_DTYPES,
    PLAIN_DTYPES,
    as_bytes,
    between_nodes,
    documented_sum,
    numbers,
    reads_neighbours,
)
from zerompi.collectives import reduce_scatter
from zerompi.collectives.reduce_scatter import reduce_blocks
from zerompi.traffic import INTRA_NODE

FLOATING = [dtype for dtype in PLAIN_DTYPES if dtype.is_floating_point or dtype.is_complex]


def summands(dtype, numel, group):
    return [numbers(dtype, numel, rank) for rank in range(group.size)]


def test_reduce_scatter_sums_in_the_documented_order_bit_for_bit(group, memory):
    n = 7
    own = slice(group.rank * n, (group.rank + 1) * n)
    for dtype in PLAIN_DTYPES:
        send = summands(dtype, n * group.size, group)
        full, recv = memory.put(send[group.rank]), memory.put(torch.empty(n, dtype=dtype))
        reduce_scatter(full, recv, group)
        assert as_bytes(memory.get(recv)) == as_bytes(documented_sum(send, group)[own]), dtype
        unchanged = numbers(dtype, n * group.size, group.rank)
        assert as_bytes(memory.get(full)) == as_bytes(unchanged), dtype


def test_mean_is_scaled_once_in_the_accumulator(group, memory):
    n = 4
    own = slice(group.rank * n, (group.rank + 1) * n)
    for dtype in FLOATING:
        send = summands(dtype, n * group.size, group)
        recv = memory.put(torch.empty(n, dtype=dtype))
        reduce_scatter(memory.put(send[group.rank]), recv, group, op="mean")
        expected = documented_sum(send, group, 1.0 / group.size)
        assert as_bytes(memory.get(recv)) == as_bytes(expected[own]), dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes_accumulate_in_float32(flat, dtype, memory):
    if flat.size < 3:
        pytest.skip("needs 3 summands")
    # 1 + eps/2 rounds to 1 in the narrow dtype, so that a naive sum stays 1.
    half_eps = torch.finfo(dtype).eps / 2
    own = 1.0 if flat.rank == 0 else half_eps
    recv = memory.put(torch.empty(1, dtype=dtype))
    reduce_scatter(memory.put(torch.full((flat.size,), own, dtype=dtype)), recv, flat)
    exact = torch.tensor(1.0 + (flat.size - 1) * half_eps).to(dtype)
    assert memory.get(recv).item() == exact.item() != 1.0


def test_float16_mean_does_not_overflow_before_the_scale(flat, memory):
    send = memory.put(torch.full((flat.size,), 60000.0, dtype=torch.float16))
    recv = memory.put(torch.empty(1, dtype=torch.float16))
    reduce_scatter(send, recv, flat, op="mean")
    assert memory.get(recv).item() == torch.tensor(60000.0, dtype=torch.float16).item()


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint64, torch.int8])
def test_integer_sums_wrap_around(flat, dtype, memory):
    top = torch.iinfo(dtype).max
    recv = memory.put(torch.empty(1, dtype=dtype))
    reduce_scatter(memory.put(torch.tensor([top] * flat.size, dtype=dtype)), recv, flat)
    bits = torch.iinfo(dtype).bits
    assert (memory.get(recv).item() - top * flat.size) % 2**bits == 0


def test_reduce_scatter_takes_arrays(flat, xp):
    for code in NUMPY_DTYPES:
        send = xp.ones((flat.size, 2), dtype=code)
        recv = xp.zeros(2, dtype=code)
        reduce_scatter(send, recv, flat)
        xp.testing.assert_array_equal(recv, xp.full(2, flat.size, dtype=code), err_msg=code)


def test_reduce_scatter_in_place_writes_its_own_block(group, memory):
    send = summands(torch.float32, 3 * group.size, group)
    array = memory.put(send[group.rank].clone().view(group.size, 3))
    reduce_scatter(array, array[group.rank], group)
    full = memory.get(array)
    expected = documented_sum(send, group).view(group.size, 3)
    assert torch.equal(full[group.rank], expected[group.rank])
    others = [rank for rank in range(group.size) if rank != group.rank]
    assert torch.equal(full[others], send[group.rank].view(group.size, 3)[others])


def test_reduce_scatter_of_nothing_sends_nothing(group, memory):
    reduce_scatter(memory.put(torch.empty(0, 4)), memory.put(torch.empty(4, 0)), group)
    assert group.traffic.total("reduce_scatter") == 0


def test_reduce_blocks_takes_blocks_of_any_length(group, memory):
    for lengths in ([3, 0, 5, 1], [0, 0, 0, 7], [0, 0, 0, 0]):
        stops = np.cumsum(lengths[: group.size]).tolist()
        ranges = list(zip([0, *stops[:-1]], stops, strict=True))
        send = summands(torch.float32, stops[-1], group)
        out = memory.put_tensor(torch.empty(lengths[group.rank]))
        reduce_blocks(memory.put_tensor(send[group.rank]), out, ranges, group)
        expected = documented_sum(send, group)[slice(*ranges[group.rank])]
        assert torch.equal(memory.get(out), expected), lengths


def test_reduce_blocks_in_chunks_sums_the_same(group, monkeypatch, memory):
    # The package names the function like its module.
    module = import_module("zerompi.collectives.reduce_scatter")
    monkeypatch.setattr(module, "_CHUNK_NBYTES", 12)
    send = summands(torch.float32, 10 * group.size, group)
    recv = memory.put(torch.empty(10))
    reduce_scatter(memory.put(send[group.rank]), recv, group)
    expected = documented_sum(send, group)
    assert torch.equal(memory.get(recv), expected[group.rank * 10 : (group.rank + 1) * 10])


def test_every_run_gives_the_same_bits(group, memory):
    send = memory.put(numbers(torch.float32, 1000 * group.size, group.rank))
    results = []
    for _ in range(3):
        recv = memory.put(torch.empty(1000))
        reduce_scatter(send, recv, group)
        results.append(as_bytes(memory.get(recv)))
    assert len(set(results)) == 1


def test_one_partial_sum_per_node_and_block_leaves_a_node(group, memory):
    numel = 10
    send, recv = torch.zeros(numel * group.size), torch.zeros(numel)
    reduce_scatter(memory.put(send), memory.put(recv), group)
    topology, rank = group.topology, group.rank
    node = topology.node_of[rank]
    neighbours = len(topology.ranks_of_node[node]) - 1
    mine = sum(topology.delegate(node, owner) == rank for owner in range(group.size))
    if reads_neighbours(group):  # counted where it is read
        inter, intra = mine - 1, mine * neighbours
    elif group.algorithm == "flat":
        inter, intra = group.size - 1 - neighbours, neighbours
    else:
        inter, intra = mine - 1, group.size - mine
    assert between_nodes(group, "reduce_scatter") == inter * numel * 4
    assert group.traffic.total("reduce_scatter", INTRA_NODE) == intra * numel * 4


def test_all_nodes_together_send_what_a_hierarchy_should(group, memory):
    numel = 6
    send, recv = torch.zeros(numel * group.size), torch.zeros(numel)
    reduce_scatter(memory.put(send), memory.put(recv), group)
    sent = group.comm.allreduce(between_nodes(group, "reduce_scatter"))
    topology = group.topology
    if group.algorithm == "flat":
        pairs = sum(
            not topology.same_node(a, b) for a in range(group.size) for b in range(group.size)
        )
    else:
        pairs = group.size * (topology.num_nodes - 1)
    assert sent == pairs * numel * 4
