"""All-reduce: the same bits on all ranks, in place, dtypes, bytes sent."""

from __future__ import annotations

import torch

from collectives.samples import NUMPY_DTYPES, PLAIN_DTYPES, as_bytes, documented_sum, numbers
from zerompi.collectives import all_gather, all_reduce, reduce_scatter
from zerompi.layout import FlatLayout
from zerompi.traffic import INTER_GROUP, INTER_NODE, INTRA_NODE


def test_all_ranks_get_the_documented_sum_bit_for_bit(group, memory):
    for dtype in PLAIN_DTYPES:
        values = [numbers(dtype, 11, rank) for rank in range(group.size)]
        send = memory.put(values[group.rank])
        recv = memory.put(torch.empty(11, dtype=dtype))
        all_reduce(send, recv, group)
        assert as_bytes(memory.get(recv)) == as_bytes(documented_sum(values, group)), dtype
        assert as_bytes(memory.get(send)) == as_bytes(numbers(dtype, 11, group.rank)), dtype


def test_all_ranks_hold_the_same_bits(group, memory):
    own = memory.put(numbers(torch.float32, 1001, group.rank))
    all_reduce(own, own, group, op="mean")
    assert len(set(group.comm.allgather(as_bytes(memory.get(own))))) == 1


def test_mean_of_all_ranks(group, memory):
    send = [numbers(torch.float32, 11, rank) for rank in range(group.size)]
    recv = memory.put(torch.empty(11))
    all_reduce(memory.put(send[group.rank]), recv, group, op="mean")
    assert torch.equal(memory.get(recv), documented_sum(send, group, 1.0 / group.size))


def test_bool_sum_is_the_logical_or(group, memory):
    own = torch.zeros(group.size + 1, dtype=torch.bool)
    own[group.rank] = True
    own = memory.put(own)
    all_reduce(own, own, group)
    assert memory.get(own).tolist() == [True] * group.size + [False]


def test_all_reduce_takes_arrays(flat, xp):
    for code in NUMPY_DTYPES:
        send = xp.ones((2, 3), dtype=code)
        recv = xp.zeros((2, 3), dtype=code)
        all_reduce(send, recv, flat)
        expected = xp.full((2, 3), flat.size, dtype=code)
        xp.testing.assert_array_equal(recv, expected, err_msg=code)


def test_all_reduce_in_place(group, memory):
    for numel in (1, 2, 3, 5, 64):
        values = [numbers(torch.float64, numel, rank) for rank in range(group.size)]
        own = memory.put(values[group.rank].clone())
        all_reduce(own, own, group)
        assert torch.equal(memory.get(own), documented_sum(values, group)), numel


def test_all_reduce_of_a_scalar(group, memory):
    recv = memory.put(torch.tensor(-1))
    all_reduce(memory.put(torch.tensor(group.rank)), recv, group)
    assert memory.get(recv).item() == sum(range(group.size))


def test_all_reduce_of_nothing_sends_nothing(group, memory):
    all_reduce(memory.put(torch.empty(3, 0)), memory.put(torch.empty(0)), group)
    assert group.traffic.total("all_reduce") == 0


def test_a_rank_sends_its_part_of_a_reduce_scatter_and_an_all_gather(flat, memory):
    numel = 12 * flat.size
    all_reduce(memory.put(torch.zeros(numel)), memory.put(torch.zeros(numel)), flat)
    assert flat.traffic.total("all_reduce") == 2 * (numel - numel // flat.size) * 4


def test_a_hierarchy_sends_what_its_reduce_scatter_and_its_all_gather_send(group, memory):
    numel, rank = 12 * group.size, group.rank
    reduced, gathered = memory.put(torch.zeros(12)), memory.put(torch.zeros(numel))
    reduce_scatter(gathered, reduced, group)
    all_gather(reduced, gathered, group)
    all_reduce(gathered, gathered, group)
    for level in (INTRA_NODE, INTER_NODE, INTER_GROUP):
        parts = [group.traffic.total(label, level) for label in ("reduce_scatter", "all_gather")]
        assert group.traffic.total("all_reduce", level) == sum(parts), (rank, level)


def test_padding_never_travels(flat, memory):
    numel = 4 * flat.size + 1
    all_reduce(memory.put(torch.zeros(numel)), memory.put(torch.zeros(numel)), flat)
    own = FlatLayout([(numel,)], flat.size).shard_ranges[flat.rank].numel
    assert flat.traffic.total("all_reduce") == (numel - own + (flat.size - 1) * own) * 4
