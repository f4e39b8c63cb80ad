"""Parameters that return beside the next forward: who uses them before waits, or is refused."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

import zerompi
from harness.memory import ON_DEVICE
from models import CASES, build, one_each, own_slice, step
from refreshes import (
    TOPOLOGIES,
    assert_same_bits,
    make_slow,
    partitioned,
    skip_if_eager,
    topology_of,
    trained,
    values_of,
)
from zerompi.unit import Unit

# Neither of the two stages sends parameters in a way of its own, so that most tests run with half of
# the pairs of stage and topology, other ones at other numbers of ranks.
pytestmark = [pytest.mark.mpi, pytest.mark.cover(1)]


@pytest.fixture(params=[1, 2])
def stage(request) -> int:
    return request.param


@pytest.fixture(params=TOPOLOGIES)
def topology(request, comm, monkeypatch):
    return topology_of(request.param, comm, monkeypatch)


# -- between a step and the next forward -------------------------------------------------------


@pytest.mark.mpi(min_size=2)
def test_parameters_read_as_nan_until_they_are_used(comm, stage, topology, monkeypatch):
    case = CASES["gpt"]
    expected = trained(comm, "gpt", stage, topology, steps=1)[1]
    make_slow(monkeypatch)
    model, optimizer, zero = partitioned(
        comm, "gpt", stage=stage, topology=topology, refresh="ahead"
    )
    skip_if_eager(zero)
    with zero:
        step(comm, case, model, optimizer)
        assert all(parameter.isnan().all() for parameter in model.parameters())
        assert [p.shape for p in model.parameters()] == [
            p.shape for p in build(case)[0].parameters()
        ]
        with pytest.raises(RuntimeError, match="single memory location"), torch.no_grad():
            model.head.weight.clamp_(-1, 1)
        with zero.gathered():
            gathered = values_of(model)
        later = values_of(model)
        model(case.batch(0)[0])
    assert all(torch.equal(gathered[name], value) for name, value in expected.items())
    assert all(torch.equal(later[name], value) for name, value in expected.items())


@pytest.mark.mpi(min_size=2)
def test_by_default_parameters_can_be_read_after_the_step(comm, stage, topology, monkeypatch):
    expected = trained(comm, "gpt", stage, topology, steps=1)[1]
    make_slow(monkeypatch)
    model, optimizer, zero = partitioned(comm, "gpt", stage=stage, topology=topology)
    with zero:
        step(comm, CASES["gpt"], model, optimizer)
        found = values_of(model)
        assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.skipif(ON_DEVICE, reason="ranks of a node share memory on the host only")
@pytest.mark.mpi(min_size=2)
def test_on_one_node_parameters_can_be_read_after_the_step(comm, stage, monkeypatch):
    monkeypatch.setenv("ZEROMPI_SHARED_MEMORY", "1")
    topology = zerompi.Topology(comm, ranks_per_node=comm.size)
    expected = trained(comm, "gpt", stage, topology, steps=1)[1]
    model, optimizer, zero = partitioned(
        comm, "gpt", stage=stage, topology=topology, refresh="ahead"
    )
    with zero:
        step(comm, CASES["gpt"], model, optimizer)
        found = values_of(model)
        assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_every_module_waits_when_it_is_called_alone(comm, stage, topology, monkeypatch):
    case = CASES["gpt"]
    x = torch.linspace(-1, 1, 2 * 3 * 20).view(2, 3, 20)

    def calls(model):
        yield lambda: model.blocks[2].down(x.repeat(1, 1, 4))
        yield lambda: model.blocks[1](x)
        yield lambda: model.norm(x)
        yield lambda: model.token(torch.tensor([3]))

    def run(refresh):
        model, optimizer, zero = partitioned(
            comm, "gpt", stage=stage, topology=topology, refresh=refresh
        )
        with zero, torch.no_grad():
            outputs = []
            for number, _ in enumerate(calls(model)):
                with torch.enable_grad():
                    step(comm, case, model, optimizer, number)
                outputs.append(list(calls(model))[number]())
            return [], dict(enumerate(outputs))

    expected = run("eager")
    make_slow(monkeypatch)
    assert_same_bits(run("ahead"), expected)


def test_a_state_dict_and_a_state_dict_that_is_loaded_wait(comm, stage, monkeypatch):
    monkeypatch.setenv("ZEROMPI_SHARED_MEMORY", "0")
    case, topology = CASES["mlp"], one_each(comm)
    expected = trained(comm, "mlp", stage, topology, steps=1)[1]
    make_slow(monkeypatch)
    model, optimizer, zero = partitioned(
        comm, "mlp", stage=stage, topology=topology, refresh="ahead"
    )
    with zero:
        step(comm, case, model, optimizer)
        found = {key: value.clone() for key, value in model.state_dict().items()}
        step(comm, case, model, optimizer)
        model.load_state_dict(found)
        assert all(torch.equal(value, expected[key]) for key, value in found.items())
        assert all(
            torch.equal(value, expected[key]) for key, value in zero.full_state_dict().items()
        )


@pytest.mark.cover
@pytest.mark.parametrize("ending", ["save", "load", "full_state_dict", "close"])
def test_what_follows_a_step_waits(comm, stage, topology, ending, monkeypatch, tmp_path):
    case = CASES["gpt"]
    expected = trained(comm, "gpt", stage, topology, steps=2)[1]
    path = comm.bcast(str(tmp_path / "step-1"))
    make_slow(monkeypatch)
    model, optimizer, zero = partitioned(
        comm, "gpt", stage=stage, topology=topology, refresh="ahead"
    )
    with zero:
        step(comm, case, model, optimizer, 0)
        if ending in ("save", "load"):
            zero.save(path)
        step(comm, case, model, optimizer, 1)
        if ending == "save":
            zero.save(path)
            zero.load(path)
        elif ending == "load":
            zero.load(path)
            step(comm, case, model, optimizer, 1)
        if ending != "close":
            state = zero.full_state_dict()
            assert all(torch.equal(state[key], value) for key, value in expected.items())
    found = values_of(model)
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_a_skipped_step_hides_nothing(comm, stage, topology):
    case = CASES["gpt"]
    model, optimizer, zero = partitioned(
        comm, "gpt", stage=stage, topology=topology, refresh="ahead", nonfinite="skip"
    )
    with zero:
        step(comm, case, model, optimizer)
        x, y = own_slice(case.batch(1), comm.rank, comm.size)
        loss = case.loss(model(x), y)
        before = values_of(model)
        (loss * (float("nan") if comm.rank == 0 else 1.0)).backward()
        optimizer.step()
        found = values_of(model)
        assert zero.skipped_steps == 1
        assert all(torch.equal(found[name], value) for name, value in before.items())


# -- misuse ------------------------------------------------------------------------------------


@pytest.mark.cover
@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("what", ["steps alone", "leaves out a step", "ends"])
def test_a_rank_that_goes_another_way_ends_with_an_error_on_all(comm, stage, topology, what):
    case = CASES["gpt"]
    model, optimizer, zero = partitioned(
        comm, "gpt", stage=stage, topology=topology, refresh="ahead"
    )
    is_odd = comm.rank == comm.size - 1

    def train():
        step(comm, case, model, optimizer)
        if what == "ends" and is_odd:
            zero.close()
            return
        x, y = own_slice(case.batch(0), comm.rank, comm.size)
        if what == "steps alone" and is_odd:
            optimizer.step()
        case.loss(model(x), y).backward()
        if not (what == "leaves out a step" and is_odd):
            optimizer.step()
        case.loss(model(x), y).backward()

    with pytest.raises(zerompi.MismatchError, match="ranks disagree on what comes next"):
        train()


@pytest.mark.mpi(min_size=2)
def test_a_refresh_that_fails_raises_where_it_is_waited_for(comm, stage, topology, monkeypatch):
    case = CASES["gpt"]
    model, optimizer, zero = partitioned(
        comm, "gpt", stage=stage, topology=topology, refresh="ahead"
    )
    skip_if_eager(zero)
    step(comm, case, model, optimizer)
    with zero.gathered():
        refresh = Unit.refresh

    def fails(unit, **options):
        if unit.name == "blocks.1":
            raise ValueError("no luck")
        refresh(unit, **options)

    monkeypatch.setattr(Unit, "refresh", fails)
    step(comm, case, model, optimizer)
    x = case.batch(0)[0]
    for _ in range(2):
        with pytest.raises(ValueError, match="no luck"):
            model(x)
    with pytest.raises(ValueError, match="no luck"):
        model.blocks[2](torch.ones(1, 2, 20))
    assert all(p.isnan().all() for p in model.blocks[1:].parameters())
    monkeypatch.setattr(Unit, "refresh", refresh)
    zero.close()


@pytest.mark.mpi(min_size=2)
def test_parameters_changed_by_hand_are_noticed_before_they_are_refreshed(comm, stage):
    model, optimizer, zero = partitioned(
        comm, "mlp", stage=stage, topology=one_each(comm), refresh="ahead"
    )
    skip_if_eager(zero)
    step(comm, CASES["mlp"], model, optimizer)
    x, y = own_slice(CASES["mlp"].batch(0), comm.rank, comm.size)
    CASES["mlp"].loss(model(x), y).backward()
    model.gain.data = torch.tensor(2.0)
    with pytest.raises(zerompi.ZerompiError, match="somebody has replaced the data of gain"):
        optimizer.step()


def test_wrong_arguments(comm):
    model, optimizer = build(CASES["mlp"])
    with pytest.raises(ValueError, match="refresh: expected 'eager' or 'ahead', got 'late'"):
        zerompi.partition(model, optimizer, comm=comm, stage=1, refresh="late")
    refresh = "ahead" if comm.rank else "eager"
    differs = pytest.raises(zerompi.MismatchError, match="refresh eager")
    with differs if comm.size > 1 else nullcontext():
        zerompi.partition(model, optimizer, comm=comm, stage=1, refresh=refresh).close()
