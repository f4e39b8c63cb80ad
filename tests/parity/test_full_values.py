"""Full parameters: gathered, full_state_dict, load_full_state_dict, models on the meta device."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import zerompi
from models import CASES, GPT, build, one_each, own_slice, unsharded_losses

STAGES = [0, 1, 2, 3]
MIXED = zerompi.MixedPrecision(torch.bfloat16)


@pytest.fixture(params=STAGES)
def stage(request) -> int:
    return request.param


@pytest.fixture(params=[None, MIXED], ids=["float32", "bfloat16"])
def precision(request):
    return request.param


def test_full_state_dict_is_what_training_started_from(comm, stage, precision):
    model, optimizer = build(CASES["tied"], seed=7 + comm.rank)
    expected = comm.bcast(model.state_dict())
    with zerompi.partition(
        model, optimizer, stage=stage, comm=comm, mixed_precision=precision
    ) as zero:
        state = zero.full_state_dict()
        assert list(state) == list(expected)
        for key, value in expected.items():
            assert torch.equal(state[key], value)
        assert state["token.weight"] is state["head.weight"]
        on_rank_0 = zero.full_state_dict(rank0_only=True)
        assert bool(on_rank_0) == (comm.rank == 0)


def test_load_full_state_dict_takes_rank_0s(comm, stage, precision):
    case = CASES["gpt"]
    model, optimizer = build(case)
    other, _ = build(case, seed=99)
    with zerompi.partition(
        model, optimizer, stage=stage, comm=comm, mixed_precision=precision
    ) as zero:
        zero.load_full_state_dict(other.state_dict() if comm.rank == 0 else None)
        state = zero.full_state_dict()
        for key, value in other.state_dict().items():
            assert torch.equal(state[key], value)
        x, _ = case.batch(0)
        with torch.no_grad():
            dtype = torch.float32 if precision is None else torch.bfloat16
            torch.testing.assert_close(model(x), other.to(dtype)(x))


def test_load_full_state_dict_refuses_another_models_and_changes_nothing(comm, stage):
    model, optimizer = build(CASES["gpt"])
    with zerompi.partition(model, optimizer, stage=stage, comm=comm) as zero:
        before = zero.full_state_dict()
        wrong = dict(before)
        wrong["extra"] = wrong.pop("head.weight")
        wrong["position"] = torch.zeros(3)
        with pytest.raises(zerompi.ZerompiError, match=r"missing: head\.weight") as error:
            zero.load_full_state_dict(wrong)
        assert "unexpected: extra" in str(error.value)
        assert "position: expected shape (9, 20), got (3,)" in str(error.value)
        after = zero.full_state_dict()
        assert all(torch.equal(after[key], before[key]) for key in before)


def test_gathered_shows_ordinary_tensors(comm, stage):
    model, optimizer = build(CASES["gpt"])
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    topology = one_each(comm)
    with zerompi.partition(model, optimizer, stage=stage, comm=comm, topology=topology) as zero:
        with zero.gathered():
            for name, parameter in model.named_parameters():
                assert torch.equal(parameter, expected[name])
            assert set(model.state_dict()) == set(expected)
        with zero.gathered(model.blocks[1]):
            assert torch.equal(model.blocks[1].up.weight, expected["blocks.1.up.weight"])
            visible = bool(torch.equal(model.blocks[0].up.weight, expected["blocks.0.up.weight"]))
            assert visible == (stage < 3 or comm.size == 1)


def test_forwards_inside_gathered_gather_nothing(comm, stage):
    case = CASES["gpt"]
    model, optimizer = build(case)
    x, _ = case.batch(0)
    with torch.no_grad():
        expected = model(x)
    with zerompi.partition(model, optimizer, stage=stage, comm=comm) as zero, zero.gathered():
        sent = zero._context.world.traffic.total()
        with torch.no_grad():
            if comm.rank == 0:  # generation on one rank alone
                assert torch.equal(model(x), expected)
        assert zero._context.world.traffic.total() == sent


def test_gathered_writable_takes_rank_0s_values(comm, stage, precision):
    case = CASES["gpt"]
    model, optimizer = build(case)
    with zerompi.partition(
        model, optimizer, stage=stage, comm=comm, mixed_precision=precision
    ) as zero:
        with zero.gathered(model.blocks[0], writable=True), torch.no_grad():
            assert model.blocks[0].up.weight.dtype is torch.float32
            model.blocks[0].up.weight.fill_(3.0 + comm.rank)
        state = zero.full_state_dict()
        assert bool((state["blocks.0.up.weight"] == 3.0).all())
        x, y = own_slice(case.batch(0), comm.rank, comm.size)
        case.loss(model(x), y).backward()
        optimizer.step()
        trained = zero.full_state_dict()["blocks.0.up.weight"]
        assert trained.mean().item() == pytest.approx(3.0, abs=0.01)
        assert not torch.equal(trained, state["blocks.0.up.weight"])


def test_forward_inside_gathered_writable_is_refused(comm):
    case = CASES["gpt"]
    model, optimizer = build(case)
    zero = zerompi.partition(model, optimizer, comm=comm)
    with (
        pytest.raises(zerompi.ZerompiError, match=r"gathered\(writable=True\)"),
        zero.gathered(writable=True),
    ):
        model(case.batch(0)[0])
    zero.close()


@pytest.mark.mpi(min_size=2)
def test_parameters_outside_their_units_forward_read_as_nan(comm):
    model, optimizer = build(CASES["gpt"])
    with zerompi.partition(model, optimizer, stage=3, comm=comm, topology=one_each(comm)):
        weight = model.blocks[0].up.weight
        assert weight.shape == (80, 20)
        assert bool(weight.isnan().all())
        with pytest.raises(RuntimeError), torch.no_grad():
            weight.add_(1.0)


@pytest.mark.mpi(min_size=2)
def test_state_dict_of_a_sharded_model_is_refused_with_advice(comm):
    model, optimizer = build(CASES["gpt"])
    topology = one_each(comm)
    with zerompi.partition(model, optimizer, stage=3, comm=comm, topology=topology) as zero:
        with pytest.raises(zerompi.ZerompiError, match="full_state_dict"):
            model.state_dict()
        with pytest.raises(zerompi.ZerompiError, match="load_full_state_dict"):
            model.load_state_dict(zero.full_state_dict())


# -- the meta device ---------------------------------------------------------------------------


def test_meta_model_trains_after_load_full_state_dict(comm, stage):
    case = CASES["tied"]
    expected, reference = unsharded_losses(case, steps=3)
    with torch.device("meta"):
        model = case.make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    start, _ = build(case)
    losses = []
    with zerompi.partition(model, optimizer, stage=stage, comm=comm) as zero:
        assert model.head.weight is model.token.weight
        with pytest.raises(zerompi.ZerompiError, match="no values yet: position"):
            model(case.batch(0)[0])
        zero.load_full_state_dict(start.state_dict() if comm.rank == 0 else None)
        for step in range(3):
            x, y = own_slice(case.batch(step), comm.rank, comm.size)
            loss = case.loss(model(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(comm.allreduce(loss.item()) / comm.size)
    assert losses == pytest.approx(expected, rel=1e-5)
    assert reference is not model


def test_meta_model_is_initialised_by_reset_parameters(comm, stage, precision):
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    torch.manual_seed(11 + comm.rank)
    with zerompi.partition(model, stage=stage, comm=comm, mixed_precision=precision) as zero:
        state = zero.full_state_dict()
    assert all(torch.isfinite(value).all() for value in state.values())
    assert 0.1 < state["0.weight"].std() < 1.0
    assert bool((state["1.running_var"] == 1).all())
    everywhere = comm.allgather(state["0.weight"])
    assert all(torch.equal(value, everywhere[0]) for value in everywhere)


@pytest.mark.mpi(min_size=2)
def test_meta_model_never_holds_more_than_a_unit(comm):
    """The peak of live tensor bytes during partition stays near shard + one unit."""
    with torch.device("meta"):
        model = nn.Sequential(*[nn.Linear(256, 256) for _ in range(16)])
    unit_nbytes = 4 * (256 * 256 + 256)
    with zerompi.partition(model, stage=3, comm=comm, units=list(model)) as zero:
        memory = zero.report().memory
        assert memory.now["parameters"] == pytest.approx(16 * unit_nbytes / comm.size, rel=1e-3)
        padding = 64 * comm.size  # each rank's part of a unit begins on a cache line
        assert memory.peak["buffers"] <= 2 * (unit_nbytes + padding)


@pytest.mark.mpi(min_size=2)
def test_ranks_with_different_devices_get_an_error(comm):
    with torch.device("meta" if comm.rank else "cpu"):
        model = GPT()
    with pytest.raises(zerompi.MismatchError, match="rank 0 has .*on cpu.*rank 1 has .*on meta"):
        zerompi.partition(model, comm=comm)
