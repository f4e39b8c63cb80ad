"""Parameters that return beside the next forward are those that return before the step does."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import zerompi
from models import CASES, GPT, OPTIMIZERS, assert_same_weights, one_each, own_slice, step
from refreshes import (
    TOPOLOGIES,
    assert_same_bits,
    make_slow,
    partitioned,
    skip_if_eager,
    topology_of,
    trained,
)
from test_join import COUNTS, assert_same_schedule, train_unsharded, train_weighted, warm_up
from test_stages import assert_trains_alike
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


# -- training ----------------------------------------------------------------------------------


@pytest.mark.cover
@pytest.mark.parametrize("name", CASES)
def test_losses_equal_unsharded_torch(comm, name, stage, topology, monkeypatch):
    make_slow(monkeypatch, 0.002)
    assert_trains_alike(comm, name, stage, topology=topology, refresh="ahead", clip=0.5, steps=8)


@pytest.mark.cover
@pytest.mark.parametrize("name", ["gpt", "lora"])
def test_it_changes_no_bit(comm, name, stage, topology, monkeypatch):
    expected = trained(comm, name, stage, topology)
    make_slow(monkeypatch)
    assert_same_bits(trained(comm, name, stage, topology, refresh="ahead"), expected)


@pytest.mark.cover
@pytest.mark.parametrize("reduce_dtype", [torch.float32, torch.bfloat16])
def test_it_changes_no_bit_with_mixed_precision(comm, stage, topology, reduce_dtype, monkeypatch):
    mixed = zerompi.MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=reduce_dtype)
    expected = trained(comm, "gpt", stage, topology, mixed_precision=mixed)
    make_slow(monkeypatch)
    ours = trained(comm, "gpt", stage, topology, mixed_precision=mixed, refresh="ahead")
    assert_same_bits(ours, expected)


def test_it_changes_no_bit_without_a_communication_thread(comm, stage, topology, monkeypatch):
    expected = trained(comm, "gpt", stage, topology)
    monkeypatch.setenv("ZEROMPI_COMM_THREAD", "0")
    assert_same_bits(trained(comm, "gpt", stage, topology, refresh="ahead"), expected)


@pytest.mark.mpi(min_size=4)
@pytest.mark.parametrize("shard_ranks", [1, 2, "node"])
def test_it_changes_no_bit_with_several_copies(comm, stage, shard_ranks, monkeypatch):
    options = {"shard_ranks": shard_ranks, "topology": zerompi.Topology(comm, [1] * comm.size)}
    expected = trained(comm, "gpt", stage, **options)
    make_slow(monkeypatch)
    assert_same_bits(trained(comm, "gpt", stage, refresh="ahead", **options), expected)


def test_buffers_that_change_in_each_forward_are_rank_0s(comm, stage, topology, monkeypatch):
    def train(refresh):
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(7, 9), nn.BatchNorm1d(9), nn.Tanh(), nn.Linear(9, 3))
        optimizer = OPTIMIZERS["adamw"](list(model.parameters()))
        units = [model[0], model[3]]
        options = {"stage": stage, "comm": comm, "topology": topology, "units": units}
        with zerompi.partition(model, optimizer, refresh=refresh, **options) as zero:
            losses = [step(comm, CASES["mlp"], model, optimizer, n) for n in range(4)]
            return losses, zero.full_state_dict()

    expected = train("eager")
    make_slow(monkeypatch)
    assert_same_bits(train("ahead"), expected)


def test_recomputed_units_accumulation_and_evaluation(comm, stage, topology, monkeypatch):
    class Recomputing(GPT):
        def forward(self, tokens):
            x = self.token(tokens) + self.position[: tokens.shape[1]]
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=False)
            return self.head(self.norm(x))

    case = CASES["gpt"]

    def train(refresh):
        torch.manual_seed(5)
        model = Recomputing()
        optimizer = OPTIMIZERS["sgd"](list(model.parameters()))
        losses = []
        options = {"stage": stage, "comm": comm, "topology": topology, "refresh": refresh}
        with zerompi.partition(model, optimizer, **options) as zero:
            for turn in range(3):
                with zero.accumulate(2):
                    for part in range(2):
                        x, y = own_slice(case.batch(2 * turn + part), comm.rank, comm.size)
                        case.loss(model(x), y).backward()
                optimizer.step()
                optimizer.zero_grad()
                model.eval()
                with torch.no_grad():
                    losses.append(case.loss(model(x), y).item())
                model.train()
                with zero.no_sync():
                    case.loss(model(x), y).backward()
            return losses, zero.full_state_dict()

    expected = train("eager")
    make_slow(monkeypatch)
    assert_same_bits(train("ahead"), expected)


@pytest.mark.parametrize("counts", COUNTS)
def test_ranks_with_other_numbers_of_batches(comm, stage, topology, counts, monkeypatch):
    case = CASES["gpt"]
    reference, expected = train_unsharded(case, counts, comm.size, clip=0.5)
    make_slow(monkeypatch)
    model, optimizer, zero = partitioned(
        comm, "gpt", stage=stage, topology=topology, refresh="ahead"
    )
    scheduler = warm_up(optimizer)
    with zero:
        with zero.join(scheduler):
            train_weighted(case, counts, comm.rank, model, optimizer, scheduler, zero)
        state = zero.full_state_dict()
        assert_same_schedule(optimizer, scheduler, expected)
        step(comm, case, model, optimizer)
        step(comm, case, model, optimizer)
    assert_same_weights(state, reference, rtol=1e-3, atol=1e-4)


def test_two_steps_in_a_row(comm, stage, topology, monkeypatch):
    case = CASES["gpt"]

    def train(refresh):
        model, optimizer, zero = partitioned(
            comm, "gpt", stage=stage, topology=topology, refresh=refresh
        )
        with zero:
            losses = []
            for number in range(3):
                x, y = own_slice(case.batch(number), comm.rank, comm.size)
                loss = case.loss(model(x), y)
                loss.backward()
                losses.append(loss.item())
                optimizer.step()
                optimizer.step()
                optimizer.zero_grad()
            return losses, zero.full_state_dict()

    expected = train("eager")
    make_slow(monkeypatch)
    assert_same_bits(train("ahead"), expected)


def test_a_loss_scale_that_overflows_changes_no_bit(comm, stage, topology, monkeypatch):
    mixed = zerompi.MixedPrecision(param_dtype=torch.float16, loss_scale="dynamic")
    expected = trained(comm, "gpt", stage, topology, mixed_precision=mixed)
    make_slow(monkeypatch)
    ours = trained(comm, "gpt", stage, topology, mixed_precision=mixed, refresh="ahead")
    assert_same_bits(ours, expected)


def test_a_forward_that_fails_can_be_repeated(comm, stage, topology, monkeypatch):
    case = CASES["gpt"]

    def train(refresh, *, fails):
        model, optimizer, zero = partitioned(
            comm, "gpt", stage=stage, topology=topology, refresh=refresh
        )
        with zero:
            losses = []
            for number in range(3):
                if fails:
                    with pytest.raises(IndexError):
                        model(torch.full((1, 2), 1000))
                losses.append(step(comm, case, model, optimizer, number))
            return losses, zero.full_state_dict()

    expected = train("eager", fails=False)
    make_slow(monkeypatch)
    assert_same_bits(train("ahead", fails=True), expected)


def test_models_that_step_by_turns(comm, stage, topology, monkeypatch):
    case = CASES["mlp"]

    def train(refresh):
        pairs = [
            partitioned(comm, "mlp", stage=stage, topology=topology, refresh=refresh)
            for _ in range(2)
        ]
        (first, optimizer1, zero1), (second, optimizer2, zero2) = pairs
        losses = []
        with zero1, zero2:
            for number in range(4):
                x, y = own_slice(case.batch(number), comm.rank, comm.size)
                loss = case.loss(first(x) + second(x), y)
                loss.backward()
                losses.append(loss.item())
                for optimizer in (optimizer1, optimizer2):
                    optimizer.step()
                    optimizer.zero_grad()
            return losses, zero1.full_state_dict()

    expected = train("eager")
    make_slow(monkeypatch)
    assert_same_bits(train("ahead"), expected)


# -- when --------------------------------------------------------------------------------------


@pytest.mark.mpi(min_size=2)
def test_the_last_unit_is_refreshed_beside_the_forward_of_the_first(
    comm, stage, topology, monkeypatch
):
    case, used = CASES["gpt"], threading.Event()
    model, optimizer, zero = partitioned(
        comm, "gpt", stage=stage, topology=topology, refresh="ahead"
    )
    skip_if_eager(zero)
    refresh, came = Unit.refresh, []

    def after_the_first(unit, **options):
        if unit.name == "blocks.2":
            came.append(used.wait(30))
        refresh(unit, **options)

    with zero:
        step(comm, case, model, optimizer)
        model.blocks[0].register_forward_hook(lambda *_: used.set())
        monkeypatch.setattr(Unit, "refresh", after_the_first)
        for _ in range(2):
            used.clear()
            model(case.batch(0)[0])
            used.clear()
            step(comm, case, model, optimizer)
    assert len(came) >= 2
    assert all(came)


class Backwards(nn.Module):
    """Layers that are used in the reverse of their order; on rank `odd` in another one."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(7, 7) for _ in range(4))
        self.last = nn.Linear(7, 3)

    def forward(self, x):
        for layer in reversed(self.layers):
            x = x + layer(x).tanh()
        return self.last(x)


@pytest.mark.mpi(min_size=2)
def test_the_order_is_that_of_rank_0s_forward(comm, stage, monkeypatch):
    case = CASES["mlp"]
    torch.manual_seed(1)
    model = Backwards()
    if comm.rank == 1:
        model.forward = lambda x: Backwards.forward(model, model.layers[0](x) * 0 + x)
    optimizer = OPTIMIZERS["sgd"](list(model.parameters()))
    refresh, order = Unit.refresh, []

    def noted(unit, **options):
        order.append(unit.name)
        refresh(unit, **options)

    monkeypatch.setattr(Unit, "refresh", noted)
    options = {"stage": stage, "comm": comm, "topology": one_each(comm), "refresh": "ahead"}
    with zerompi.partition(model, optimizer, **options) as zero:
        skip_if_eager(zero)
        for number in range(2):
            step(comm, case, model, optimizer, number)
            with zero.gathered():
                pass
            assert order == ["(root)", *(f"layers.{index}" for index in (3, 2, 1, 0))]
            order.clear()


@pytest.mark.mpi(min_size=2)
def test_each_step_moves_what_it_moved(comm, stage, topology, monkeypatch):
    """The bytes of a refresh are in the report of the step that they come in time for."""

    def traffic(refresh):
        model, optimizer, zero = partitioned(
            comm, "gpt", stage=stage, topology=topology, refresh=refresh
        )
        reports = []
        with zero:
            if refresh == "ahead":
                skip_if_eager(zero)
            for number in range(4):
                step(comm, CASES["gpt"], model, optimizer, number)
                report = zero.report()
                moved = dict(report.traffic)
                moved.pop("header")
                reports.append((moved, dict(report.memory.now)))
        return reports

    expected = traffic("eager")
    make_slow(monkeypatch)
    ours = traffic("ahead")
    assert ours[2:] == expected[2:]
    assert "refresh" not in ours[0][0]
    assert ours[1][0] == {**expected[1][0]}
