"""Every stage trains like unsharded torch on the same global batch."""

from __future__ import annotations

import pytest
from mpi4py import MPI

import zerompi
from models import CASES, OPTIMIZERS, STEPS, assert_same_weights, build, own_slice, unsharded_losses

STAGES = [0, 1, 2, 3]
FEW_STEPS = 5  # for what takes part in every step


def partitioned_losses(comm, case, stage, *, optimizer="adamw", steps=STEPS, clip=None, **options):
    """Losses (mean over ranks) and full state dict of the same training, partitioned."""
    seed = 7 if comm.rank == 0 else 70 + comm.rank  # rank 0's parameters must win
    model, opt = build(case, optimizer, seed)
    losses = []
    with zerompi.partition(model, opt, stage=stage, comm=comm, **options) as zero:
        for step in range(steps):
            x, y = own_slice(case.batch(step), comm.rank, comm.size)
            loss = case.loss(model(x), y)
            loss.backward()
            if clip is not None:
                zero.clip_grad_norm_(clip)
            opt.step()
            opt.zero_grad()
            losses.append(comm.allreduce(loss.item()) / comm.size)
        return losses, zero.full_state_dict()


def assert_trains_alike(comm, name, stage, **options):
    case = CASES[name]
    reference = {k: v for k, v in options.items() if k in ("optimizer", "steps", "clip")}
    expected, model = unsharded_losses(case, **reference)
    losses, state = partitioned_losses(comm, case, stage, **options)
    assert losses == pytest.approx(expected, rel=1e-5)
    assert list(state) == list(model.state_dict())
    assert_same_weights(state, model, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", CASES)
def test_losses_equal_unsharded_torch(comm, name, stage):
    assert_trains_alike(comm, name, stage)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("optimizer", [name for name in OPTIMIZERS if name != "adamw"])
def test_losses_equal_unsharded_torch_with_other_optimizers(comm, optimizer, stage):
    assert_trains_alike(comm, "gpt", stage, optimizer=optimizer, steps=FEW_STEPS)


@pytest.mark.parametrize("stage", STAGES)
def test_clipping_equals_unsharded_torch(comm, stage):
    assert_trains_alike(comm, "gpt", stage, clip=0.1, steps=FEW_STEPS)


@pytest.mark.cover(where=lambda case: sum(case["nodes"]) == MPI.COMM_WORLD.size)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("nodes", [(2, 2), (3, 1), (1, 2), (1, 1)], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_losses_equal_unsharded_torch_on_faked_nodes(comm, name, nodes, stage):
    topology = zerompi.Topology(comm, ranks_per_node=nodes)
    assert_trains_alike(comm, name, stage, steps=FEW_STEPS, topology=topology)


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("shard_ranks", [1, 2, "node"])
def test_losses_equal_unsharded_torch_with_several_copies(comm, shard_ranks, stage):
    if comm.size != 4:
        pytest.skip("needs 4 ranks")
    topology = zerompi.Topology(comm, ranks_per_node=2)
    options = {"shard_ranks": shard_ranks, "topology": topology}
    assert_trains_alike(comm, "gpt", stage, steps=FEW_STEPS, **options)


@pytest.mark.parametrize("stage", [1, 3])
def test_partitions_on_subcommunicators_live_side_by_side(comm, stage):
    half = comm.Split(comm.rank % 2, comm.rank)
    try:
        assert_trains_alike(half, "mlp", stage, steps=3)
    finally:
        half.Free()
