"""Node layouts as data: delegates, restriction, errors."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mpi4py import MPI

from zerompi.topology import Topology

labels = st.lists(st.integers(0, 4), min_size=1, max_size=12)


@given(labels)
def test_nodes_are_numbered_by_their_first_rank(labels):
    topology = Topology.from_nodes(labels)
    firsts = [ranks[0] for ranks in topology.ranks_of_node]
    assert firsts == sorted(firsts)
    for a in range(topology.size):
        for b in range(topology.size):
            assert topology.same_node(a, b) == (labels[a] == labels[b])


@given(labels)
def test_ranks_of_nodes_are_ascending_and_complete(labels):
    topology = Topology.from_nodes(labels)
    assert sorted(r for ranks in topology.ranks_of_node for r in ranks) == list(range(len(labels)))
    for rank in range(topology.size):
        ranks = topology.ranks_of_node[topology.node_of[rank]]
        assert list(ranks) == sorted(ranks)
        assert ranks[topology.local_rank_of[rank]] == rank


@given(labels)
def test_a_delegate_lives_on_its_node_and_every_rank_is_its_own(labels):
    topology = Topology.from_nodes(labels)
    for owner in range(topology.size):
        assert topology.delegate(topology.node_of[owner], owner) == owner
        for node in range(topology.num_nodes):
            assert topology.delegate(node, owner) in topology.ranks_of_node[node]


@given(labels)
def test_delegates_of_equal_nodes_share_the_work_evenly(labels):
    topology = Topology.from_nodes(labels)
    sizes = {len(ranks) for ranks in topology.ranks_of_node}
    if len(sizes) == 1:
        for node, ranks in enumerate(topology.ranks_of_node):
            work = [topology.delegate(node, owner) for owner in range(topology.size)]
            assert {work.count(rank) for rank in ranks} == {topology.num_nodes}


@given(labels, st.data())
def test_restriction_keeps_who_shares_a_node(labels, data):
    topology = Topology.from_nodes(labels)
    ranks = data.draw(st.permutations(range(topology.size)))
    ranks = ranks[: data.draw(st.integers(1, len(ranks)))]
    part = topology.restrict(ranks)
    assert part.size == len(ranks)
    for i, a in enumerate(ranks):
        for j, b in enumerate(ranks):
            assert part.same_node(i, j) == topology.same_node(a, b)


@given(labels)
def test_shard_order_does_not_depend_on_the_layout(labels):
    topology = Topology.from_nodes(labels)
    for rank in range(topology.size):
        assert topology.shard_index(rank) == rank
        assert topology.rank_of_shard(topology.shard_index(rank)) == rank


@given(labels, st.data())
def test_a_group_delegate_lives_in_its_group_and_is_the_delegate_on_its_node(labels, data):
    nodes = len(set(labels))
    groups = data.draw(st.lists(st.integers(0, 2), min_size=nodes, max_size=nodes))
    topology = Topology.from_nodes(labels, groups)
    for owner in range(topology.size):
        assert topology.group_delegate(topology.group_of(owner), owner) == owner
        for group in range(topology.num_groups):
            rank = topology.group_delegate(group, owner)
            assert topology.group_of(rank) == group
            assert topology.delegate(topology.node_of[rank], owner) == rank


def test_groups_of_nodes_are_counted_in_nodes_and_kept_by_a_restriction():
    topology = Topology.from_nodes([0, 0, 1, 2, 3], [5, 5, 7, 7])
    assert topology.nodes_of_group == ((0, 1), (2, 3))
    assert repr(topology) == "Topology(5 ranks on 4 nodes in 2 groups: 2+1+1+1)"
    assert topology != Topology.from_nodes([0, 0, 1, 2, 3])
    part = topology.restrict([4, 2, 0])
    assert [part.group_of(rank) for rank in range(3)] == [0, 1, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0, 1], [0]), "group_of_node: expected one of each of 2 nodes, got 1"),
    ],
)
def test_groups_that_do_not_cover_the_nodes_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Topology.from_nodes(*arguments)
    with pytest.raises(
        ValueError, match="nodes_per_group: expected positive numbers that sum to 1"
    ):
        Topology(MPI.COMM_SELF, 1, [2])
    with pytest.raises(TypeError, match="nodes_per_group: expected a whole number"):
        Topology(MPI.COMM_SELF, 1, "2")


def test_labels_do_not_matter_for_equality():
    assert Topology.from_nodes([7, 7, 3]) == Topology.from_nodes([0, 0, 1])
    assert hash(Topology.from_nodes([7, 7, 3])) == hash(Topology.from_nodes([0, 0, 1]))
    assert Topology.from_nodes([0, 1, 0]) != Topology.from_nodes([0, 0, 1])
    assert Topology.from_nodes([0]) != (0,)


def test_repr_tells_the_sizes_of_nodes():
    assert repr(Topology.from_nodes([0, 0, 0, 1])) == "Topology(4 ranks on 2 nodes: 3+1)"
    assert repr(Topology.from_nodes([5])) == "Topology(1 rank on 1 node: 1)"


@pytest.mark.parametrize("number", [1, np.int64(1), [1], (1,), [np.int32(1)]])
def test_ranks_per_node_takes_numbers_and_lists(number):
    assert Topology(MPI.COMM_SELF, number).node_of == (0,)


def test_a_number_larger_than_the_communicator_is_one_node():
    assert Topology(MPI.COMM_SELF, 8).is_single_node


@pytest.mark.parametrize("value", ["1", 1.0, [1.0], None.__class__, True, [True], {1}])
def test_ranks_per_node_refuses_what_is_no_number(value):
    with pytest.raises(TypeError, match="ranks_per_node: expected a whole number or a sequence"):
        Topology(MPI.COMM_SELF, value)


@pytest.mark.parametrize("value", [0, -1, [2], [], [1, 0], [0, 1], [2, -1]])
def test_ranks_per_node_refuses_what_does_not_cover_the_ranks(value):
    with pytest.raises(ValueError, match="ranks_per_node: expected"):
        Topology(MPI.COMM_SELF, value)


def test_no_ranks_are_refused():
    with pytest.raises(ValueError, match="node_of: expected at least one rank, got none"):
        Topology.from_nodes([])


def test_discovery_finds_this_process_on_one_node():
    assert Topology(MPI.COMM_SELF).ranks_of_node == ((0,),)
