"""What a partition counts equals the theory of the ZeRO paper."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import zerompi
from models import CASES, build, one_each, own_slice

STAGES = [0, 1, 2, 3]

# Sent elements in units of (N - 1) / N * Psi (arXiv:1910.02054, section 7).
THEORY = {
    0: {"all_reduce": 2},
    1: {"reduce_scatter": 1, "refresh": 1},
    2: {"reduce_scatter": 1, "refresh": 1},
    3: {"all_gather": 2, "reduce_scatter": 1},
}
GRADIENTS = {"all_reduce", "reduce_scatter"}


def layout(comm, nodes):
    """Every rank a node, so that all is sent; or all ranks on one node, where parameters are shared."""
    return one_each(comm) if nodes == "each" else zerompi.Topology(comm, ranks_per_node=comm.size)


def moved(stage, nodes, zero):
    """What moves of THEORY: where the ranks have one copy of the parameters, gradients only."""
    shared = nodes == "one" and zero.num_copies == 1
    return {k: v for k, v in THEORY[stage].items() if not shared or k in GRADIENTS}


def train(model, optimizer, loss, batch, steps=2):
    for _ in range(steps):
        x, y = batch
        loss(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()


def by_label(traffic):
    return {label: sum(levels.values()) for label, levels in traffic.items() if label != "header"}


@pytest.mark.parametrize("nodes", ["each", "one"])
@pytest.mark.parametrize("stage", STAGES)
def test_each_rank_sends_exactly_what_theory_says(comm, stage, nodes):
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(12, 12) for _ in range(5)])  # divides by 2, 3 and 4 ranks
    numel = sum(p.numel() for p in model.parameters())
    optimizer = torch.optim.Adam(model.parameters())
    topology = layout(comm, nodes)
    with zerompi.partition(model, optimizer, stage=stage, comm=comm, topology=topology) as zero:
        batch = torch.randn(6, 12), torch.randn(6, 12)
        train(model, optimizer, nn.functional.mse_loss, batch)
        traffic = by_label(zero.report().traffic)
        theory = moved(stage, nodes, zero)
    n = comm.size
    expected = {label: times * 4 * numel * (n - 1) // n for label, times in theory.items()}
    assert traffic == ({} if n == 1 else expected)


@pytest.mark.cover
@pytest.mark.parametrize("nodes", ["each", "one"])
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", ["gpt", "tied", "mlp"])
def test_all_ranks_together_send_exactly_what_theory_says(comm, name, stage, nodes):
    """Of sizes that do not divide, ranks send a little more or less; padding never travels."""
    case = CASES[name]
    model, optimizer = build(case)
    numel = sum(p.numel() for p in model.parameters())
    topology = layout(comm, nodes)
    with zerompi.partition(model, optimizer, stage=stage, comm=comm, topology=topology) as zero:
        train(model, optimizer, case.loss, own_slice(case.batch(0), comm.rank, comm.size))
        traffic = by_label(zero.report().traffic)
        theory = moved(stage, nodes, zero)
    n = comm.size
    for label, times in theory.items():
        assert comm.allreduce(traffic.get(label, 0)) == times * 4 * numel * (n - 1)
    assert set(traffic) == (set() if n == 1 else set(theory))


@pytest.mark.parametrize("stage", STAGES)
def test_levels_add_up_on_faked_nodes(comm, stage):
    """Hierarchical: over all ranks, each node receives what the others own once."""
    if comm.size != 4:
        pytest.skip("needs 4 ranks")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12))
    numel = sum(p.numel() for p in model.parameters())
    optimizer = torch.optim.Adam(model.parameters())
    topology = zerompi.Topology(comm, ranks_per_node=2)
    with zerompi.partition(model, optimizer, stage=stage, comm=comm, topology=topology) as zero:
        batch = torch.randn(6, 12), torch.randn(6, 12)
        train(model, optimizer, nn.functional.mse_loss, batch)
        traffic = zero.report().traffic
        has_node_copy = zero.num_copies == 2
    for label, times in THEORY[stage].items():
        # 2 nodes of 2: a quarter of Psi crosses per rank and phase instead of a half.
        assert traffic[label]["inter_node"] == times * 4 * numel // 4
        shared = has_node_copy and label not in GRADIENTS
        assert traffic[label].get("intra_node", 0) == (0 if shared else times * 4 * numel // 2)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("stage", [2, 3])
def test_accumulation_saves_reductions_but_not_gathers(comm, stage):
    case = CASES["gpt"]
    model, optimizer = build(case)
    numel = sum(p.numel() for p in model.parameters())
    x, y = own_slice(case.batch(0), comm.rank, comm.size)
    topology = one_each(comm)
    with zerompi.partition(model, optimizer, stage=stage, comm=comm, topology=topology) as zero:
        with zero.accumulate(3):
            for _ in range(3):
                case.loss(model(x), y).backward()
        optimizer.step()
        traffic = by_label(zero.report().traffic)
    sent = {label: comm.allreduce(nbytes) for label, nbytes in sorted(traffic.items())}
    once = 4 * numel * (comm.size - 1)
    gathers = {"refresh": once} if stage == 2 else {"all_gather": 6 * once}
    assert sent == {"reduce_scatter": once, **gathers}


@pytest.mark.parametrize("stage", STAGES)
def test_frozen_parameters_send_no_gradients_and_are_not_refreshed(comm, stage):
    case = CASES["lora"]
    model, optimizer = build(case)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    topology = one_each(comm)
    with zerompi.partition(model, optimizer, stage=stage, comm=comm, topology=topology) as zero:
        train(model, optimizer, case.loss, own_slice(case.batch(0), comm.rank, comm.size))
        traffic = by_label(zero.report().traffic)
    for label, times in THEORY[stage].items():
        if label != "all_gather":
            sent = comm.allreduce(traffic.get(label, 0))
            assert sent == times * 4 * trainable * (comm.size - 1)


@pytest.mark.parametrize("nodes", ["each", "one"])
@pytest.mark.parametrize("stage", STAGES)
def test_memory_by_category_is_the_papers_formula(comm, stage, nodes):
    model = nn.Sequential(*[nn.Linear(96, 96) for _ in range(6)])
    numel = sum(p.numel() for p in model.parameters())
    optimizer = torch.optim.Adam(model.parameters())
    precision = zerompi.MixedPrecision(torch.bfloat16, torch.bfloat16)
    with zerompi.partition(
        model,
        optimizer,
        stage=stage,
        comm=comm,
        mixed_precision=precision,
        topology=layout(comm, nodes),
    ) as zero:
        shared = zero.num_copies < comm.size
        batch = torch.randn(6, 96), torch.randn(6, 96).bfloat16()
        train(model, optimizer, nn.functional.mse_loss, batch)
        memory = zero.report().memory
    n = comm.size
    whole = 2 / n if shared else 2  # the node has one copy of the parameters
    shares = {
        0: (2, 2, 12),
        1: (whole, 2, 12 / n),
        2: (whole, 2 / n, 12 / n),
        3: (2 / n, 2 / n, 12 / n),
    }
    expected = dict(
        zip(("parameters", "gradients", "optimizer_states"), shares[stage], strict=True)
    )
    for category, per_element in expected.items():
        assert memory.formula[category] == pytest.approx(per_element * numel)
        assert memory.peak[category] == pytest.approx(per_element * numel, rel=0.02)


@pytest.mark.mpi(min_size=2)
def test_time_by_phase_is_reported(comm):
    case = CASES["gpt"]
    model, optimizer = build(case)
    with zerompi.partition(model, optimizer, comm=comm, topology=one_each(comm)) as zero:
        train(model, optimizer, case.loss, own_slice(case.batch(0), comm.rank, comm.size))
        time = zero.report().time
    assert {"all_gather", "reduce", "optimizer"} <= set(time)
    assert all(seconds > 0 for seconds in time.values())
