"""Which way a block takes: by its size, a measured table, and what the user says."""

from __future__ import annotations

import logging

import pytest
import torch

import zerompi
from harness.memory import UNDER_TEST
from zerompi.bench.collectives import Result, choice_rows, measure
from zerompi.collectives import Group, all_gather, choice, reduce_scatter

PAIRS = zerompi.Topology.from_nodes([0, 0, 1, 1])


@pytest.fixture(autouse=True)
def free_choice(monkeypatch):
    monkeypatch.delenv(choice.FORCE)
    monkeypatch.setenv("ZEROMPI_SHARED_MEMORY", "0")


def inter_node(group, collective, numel):
    """Bytes that all ranks send between nodes, of blocks of `numel` elements."""
    before = group.traffic.snapshot()
    full = UNDER_TEST.put(torch.ones(numel * group.size))
    own = UNDER_TEST.put(torch.ones(numel))
    if collective == "reduce_scatter":
        reduce_scatter(full, own, group)
        assert UNDER_TEST.get(own).eq(group.size).all()
    else:
        all_gather(own, full, group)
    sent = group.traffic.difference(before)[collective].get("inter_node", 0)
    return group.comm.allreduce(sent)


@pytest.mark.mpi(min_size=4)
@pytest.mark.parametrize("collective", choice.COLLECTIVES)
def test_small_blocks_go_flat_and_large_ones_through_the_hierarchy(comm, collective):
    if comm.size != 4:
        pytest.skip("needs 4 ranks")
    group = Group(comm, PAIRS)
    small, large = 1024, 16384
    assert inter_node(group, collective, small) == 8 * 4 * small  # each to two ranks elsewhere
    assert inter_node(group, collective, large) == 4 * 4 * large  # each to another node
    group.close()


@pytest.mark.mpi(min_size=4)
def test_the_user_and_the_table_decide(comm, monkeypatch, tmp_path, caplog):
    if comm.size != 4:
        pytest.skip("needs 4 ranks")
    path = tmp_path / "table.json"  # each rank has one; rank 0's counts
    limit = 400 if comm.rank == 0 else 0
    choice.write_table(path, [choice.Row(2, 2, False, "all_gather", limit)])
    monkeypatch.setenv(choice.TABLE, str(path))
    with caplog.at_level(logging.INFO, "zerompi"):
        groups = [Group(comm, PAIRS), Group(comm, PAIRS)]
    assert len([r for r in caplog.records if "flat" in r.message]) == (comm.rank == 0)
    assert inter_node(groups[0], "all_gather", 100) == 8 * 400
    assert inter_node(groups[0], "all_gather", 101) == 4 * 404
    assert inter_node(groups[0], "reduce_scatter", 1) == 4 * 4
    monkeypatch.setenv(choice.FORCE, "flat")
    groups.append(Group(comm, PAIRS))
    assert inter_node(groups[-1], "all_gather", 101) == 8 * 404
    groups.append(Group(comm, PAIRS, algorithm="hierarchical"))
    assert inter_node(groups[-1], "all_gather", 1) == 4 * 4
    for group in groups:
        group.close()


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "expected a table of zerompi bench"),
        ('{"rows": [{"nodes": 2}]}', "expected a table of zerompi bench"),
        (
            '{"rows": [{"nodes": 0, "ranks_per_node": 1, "shared_memory": false, '
            '"collective": "all_gather", "flat_nbytes": 1}]}',
            "nodes: got 0",
        ),
    ],
)
def test_a_broken_table_is_refused_on_all_ranks(comm, monkeypatch, tmp_path, text, message):
    if comm.size < 3:
        pytest.skip("needs 3 ranks")
    path = tmp_path / "table.json"
    path.write_text(text)
    monkeypatch.setenv(choice.TABLE, str(path))
    with pytest.raises(ValueError, match=message):
        Group(comm, zerompi.Topology(comm, ranks_per_node=2))


def test_a_layout_takes_the_row_of_the_nearest(monkeypatch, tmp_path):
    rows = [choice.Row(2, 2, False, "all_gather", 10), choice.Row(64, 8, False, "all_gather", 20)]
    path = tmp_path / "table.json"
    choice.write_table(path, rows)
    choice.write_table(path, [choice.Row(2, 2, False, "all_gather", 30)])  # measured again
    monkeypatch.setenv(choice.TABLE, str(path))
    for nodes, limit in ((3, 30), (40, 20)):
        topology = zerompi.Topology.from_nodes([rank // 4 for rank in range(4 * nodes)])
        _, limits = choice._limits(topology, shared_memory=False)
        assert limits == {"all_gather": limit, "reduce_scatter": 0}


@pytest.mark.mpi(min_size=4)
def test_a_measurement_becomes_a_table(comm, monkeypatch):
    if comm.size != 4:
        pytest.skip("needs 4 ranks")
    results = measure(comm, "all_gather", 4096, torch.float32, 1, PAIRS)
    assert {"flat", "hierarchical"} <= {result.way for result in results}
    monkeypatch.setattr("zerompi.bench.collectives.Topology", lambda comm: PAIRS)
    made = [
        Result("all_gather", way, nbytes, "float32", seconds, None)
        for nbytes, flat in ((400, 1.0), (800, 1.0), (1600, 3.0), (3200, 1.0))
        for way, seconds in (("flat", flat), ("hierarchical", 2.0))
    ]
    assert choice_rows(comm, made) == [choice.Row(2, 2, False, "all_gather", 200)]
