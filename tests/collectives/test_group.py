"""Groups: construction, agreement, splitting, several side by side, messages above MPI's counts."""

from __future__ import annotations

import os

import pytest
import torch
from mpi4py import MPI

import zerompi
from collectives.samples import as_bytes, documented_sum, numbers, raw
from zerompi.collectives import Group, all_gather, all_reduce
from zerompi.collectives import group as group_module
from zerompi.traffic import INTRA_NODE

LARGE_NBYTES = (1 << 31) + 12345


def needs(size, comm):
    if comm.size != size:
        pytest.skip(f"needs {size} ranks")


def test_the_algorithm_follows_the_topology(comm):
    one_node = zerompi.Topology(comm, comm.size)
    one_each = zerompi.Topology(comm, 1)
    for topology in (one_node, one_each):
        group = Group(comm, topology)
        assert group.algorithm == "flat"
        group.close()
    if comm.size > 2:
        group = Group(comm, zerompi.Topology(comm, 2))
        assert group.algorithm == "hierarchical"
        group.close()


def test_node_communicators_follow_the_topology(group):
    node = group.topology.node_of[group.rank]
    assert group.node_comm.allgather(group.rank) == list(group.topology.ranks_of_node[node])
    position = group.topology.local_rank_of[group.rank]
    peers = [r for r in range(group.size) if group.topology.local_rank_of[r] == position]
    assert group.inter_node_comm.allgather(group.rank) == peers


def test_wrong_arguments_of_one_rank_end_on_all(comm):
    needs_other = comm.size > 1
    wrong = comm.rank == 0
    topology = zerompi.Topology.from_nodes([0] * (comm.size + 1)) if wrong else None
    if wrong:
        expected = (ValueError, f"topology: expected one of {comm.size} ranks")
    else:
        expected = (zerompi.MismatchError, "rank 0 refused the arguments of Group: topology")
    with pytest.raises(expected[0], match=expected[1]):
        Group(comm, topology)
    with pytest.raises((ValueError, zerompi.MismatchError), match="algorithm: expected 'flat'"):
        Group(comm, algorithm="tree" if wrong else None)
    if needs_other:
        with pytest.raises(zerompi.MismatchError, match=r"algorithm flat.*algorithm hierarchical"):
            Group(comm, algorithm="flat" if wrong else "hierarchical")


@pytest.mark.parametrize("comm_like", [3, "world"])
def test_what_is_no_communicator_is_refused(comm_like):
    with pytest.raises(TypeError, match="comm: expected an MPI intra-communicator"):
        Group(comm_like)


def test_the_callers_messages_never_meet_ours(comm, memory):
    group = Group(comm)
    peer = (comm.rank + 1) % comm.size
    request = comm.isend("mine", peer)
    own = memory.put(torch.ones(10))
    all_reduce(own, own, group)
    assert comm.recv() == "mine"
    request.wait()
    assert memory.get(own)[0].item() == comm.size
    group.close()


def test_a_group_of_this_rank_alone(memory):
    group = Group(MPI.COMM_SELF)
    recv = memory.put(torch.empty(3))
    all_gather(memory.put(torch.arange(3.0)), recv, group)
    all_reduce(recv, recv, group, op="mean")
    assert memory.get(recv).tolist() == [0.0, 1.0, 2.0]
    assert group.traffic.snapshot() == {}
    group.close()


def test_agree_exchanges_64_bits(flat):
    flags = (1 << 63) | flat.rank
    assert flat.agree("same", flags) == tuple((1 << 63) | rank for rank in range(flat.size))


def test_a_header_is_16_bytes_for_each_other_rank(flat):
    flat.agree("same")
    assert flat.traffic.total("header") == 16 * (flat.size - 1)


def test_disagreement_names_every_side(flat):
    needs(3, flat.comm)
    with pytest.raises(zerompi.MismatchError, match=r"ranks 0, 2: left; rank 1: right$"):
        flat.agree("right" if flat.rank == 1 else "left")


def test_split_numbers_ranks_in_the_order_of_the_list(group, memory):
    backwards = list(range(group.size))[::-1]
    turned = group.split([backwards])
    assert turned.rank == group.size - 1 - group.rank
    assert turned.topology.node_of == group.topology.restrict(backwards).node_of
    recv = memory.put(torch.empty(group.size, dtype=torch.int64))
    all_gather(memory.put(torch.tensor([group.rank])), recv, turned)
    assert memory.get(recv).tolist() == backwards
    turned.close()


def test_split_groups_work_side_by_side_and_share_counters(group, memory):
    needs(4, group.comm)
    pairs = [[0, 3], [2, 1]]
    half = group.split(pairs)
    own = next(pair for pair in pairs if group.rank in pair)
    values = [numbers(torch.float32, 9, rank) for rank in own]
    recv = memory.put(torch.empty(9))
    all_reduce(memory.put(values[half.rank]), recv, half)
    assert torch.equal(memory.get(recv), documented_sum(values, half))
    assert group.traffic.total("all_reduce") > 0
    assert half.traffic is group.traffic
    half.close()


@pytest.mark.parametrize("lists", [[[0]], [[0, 0]], [[]], [[0, 1, 2, 3, 4]]])
def test_split_refuses_lists_that_do_not_hold_each_rank_once(flat, lists):
    if flat.size == 1 and lists == [[0]]:
        lists = [[0], [0]]
    with pytest.raises(ValueError, match="ranks_of_each: expected each of"):
        flat.split(lists)


def test_groups_side_by_side_do_not_meet(comm, memory):
    groups = [Group(comm) for _ in range(3)]
    recv = [memory.put(torch.empty(comm.size)) for _ in groups]
    for i, group in enumerate(groups):
        all_gather(memory.put(torch.tensor([10.0 * i + comm.rank])), recv[i], group)
    for i, values in enumerate(recv):
        assert memory.get(values).tolist() == [10.0 * i + rank for rank in range(comm.size)]
    for group in groups[::-1]:
        group.close()


def test_close_twice_is_allowed(comm):
    group = Group(comm)
    group.close()
    group.close()
    assert group.is_closed


@pytest.mark.cover
@pytest.mark.parametrize("limit", [1, 3, 8])
@pytest.mark.parametrize("dtype", [torch.float64, torch.uint8])
def test_long_messages_travel_in_parts(group, monkeypatch, limit, dtype, memory):
    monkeypatch.setattr(group_module, "_MAX_MESSAGE_NBYTES", limit)
    recv = memory.put(torch.empty(5 * group.size, dtype=dtype))
    all_gather(memory.put(raw(dtype, 5, group.rank)), recv, group)
    gathered = b"".join(as_bytes(raw(dtype, 5, r)) for r in range(group.size))
    assert as_bytes(memory.get(recv)) == gathered
    values = [numbers(dtype, 5, rank) for rank in range(group.size)]
    own = memory.put(values[group.rank].clone())
    all_reduce(own, own, group)
    assert torch.equal(memory.get(own), documented_sum(values, group))


def test_few_peers_in_flight_at_a_time_change_nothing(group, monkeypatch, memory):
    monkeypatch.setattr(group_module, "_PEERS_IN_FLIGHT", 1)
    values = [numbers(torch.float32, 20, rank) for rank in range(group.size)]
    own = memory.put(values[group.rank].clone())
    all_reduce(own, own, group)
    assert torch.equal(memory.get(own), documented_sum(values, group))


def test_messages_are_counted(flat, memory):
    all_gather(memory.put(torch.zeros(2)), memory.put(torch.zeros(2 * flat.size)), flat)
    assert flat.traffic.messages == 2 * (flat.size - 1)  # headers and blocks
    levels = flat.traffic.snapshot().get("all_gather", {})
    assert levels == ({INTRA_NODE: 8 * (flat.size - 1)} if flat.size > 1 else {})


@pytest.mark.slow
def test_a_tensor_above_2_to_the_31_bytes(comm):
    needs(2, comm)
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if not comm.bcast(free >= 12 << 30):
        pytest.skip("needs 12 GB of free memory")
    group = Group(comm, algorithm="flat")
    own = torch.zeros(LARGE_NBYTES, dtype=torch.uint8)
    marks = torch.tensor([0, 1, (1 << 30) - 1, 1 << 30, (1 << 31) - 1, 1 << 31, LARGE_NBYTES - 1])
    if group.rank == 0:
        own[marks] = torch.arange(1, 8, dtype=torch.uint8)
        group.exchange([(1, own)], [], "large")
        assert group.traffic.total("large") == LARGE_NBYTES
    else:
        group.exchange([], [(0, own)], "large")
        assert own[marks].tolist() == list(range(1, 8))
        assert int(own.count_nonzero()) == 7
    group.close()
