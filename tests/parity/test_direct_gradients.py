"""Gradients of linear layers are made in the bucket, and are those of unsharded torch to the bit."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import zerompi
from harness.memory import ON_DEVICE
from models import one_each
from zerompi import linear
from zerompi.gradients import Gradients

pytestmark = pytest.mark.skipif(ON_DEVICE, reason="on the host only")


@pytest.fixture(autouse=True)
def _also_small_layers(monkeypatch):
    monkeypatch.setattr(linear, "_MIN_NBYTES", 0)


@pytest.fixture
def made_in_place(monkeypatch):
    """Names of the gradients that are where they belong when they are collected."""
    names = []
    collect = Gradients.collect

    def spy(self, index, weight):
        segment = self._segment
        gradient = segment.parameters[index].grad
        if self.bucket is not None:
            place = segment.view(self.bucket.tensor, index)
            if gradient.data_ptr() == place.data_ptr():
                names.append(segment.names[index])
        collect(self, index, weight)

    monkeypatch.setattr(Gradients, "collect", spy)
    return names


class Uses(nn.Module):
    """Linear layers with everything that can happen to them; sizes keep the bucket's parts aligned."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(16, 32)
        self.often = nn.Linear(32, 32, bias=False)
        self.flat = nn.Linear(32, 16)
        self.frozen_bias = nn.Linear(16, 16)
        self.frozen_bias.bias.requires_grad_(False)
        self.tied = nn.Linear(16, 32, bias=False)
        self.tied.weight = self.first.weight
        self.last = nn.Linear(32, 16)

    def forward(self, x):
        penalty = self.last.weight.square().sum()
        x = F.relu(self.first(x), inplace=True)
        x = self.often(x)
        x = checkpoint(self.often, x, use_reentrant=True)  # brings its gradient before the others
        x = self.often(x)
        x = self.frozen_bias(self.flat(x.flatten(0, 1)))
        return self.last(self.tied(x).view(3, 8, 32).transpose(0, 1)).square().mean() + penalty


def make(model_class):
    torch.manual_seed(3)
    model = model_class()
    return model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)


def batches(count):
    generator = torch.Generator().manual_seed(4)
    return [torch.randn(3, 8, 16, generator=generator) for _ in range(count)]


def passes(model, xs):
    for x in xs:
        model(x).backward()


def steps(model, optimizer, schedule, accumulate=None):
    """Train on every rank with the same batches, so that the mean over ranks is exact."""
    xs = iter(batches(sum(schedule)))
    for count in schedule:
        micro = [next(xs) for _ in range(count)]
        if accumulate is None:
            passes(model, micro)
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad.div_(count)
        else:
            with accumulate(count):
                passes(model, micro)
        optimizer.step()
        optimizer.zero_grad()


def assert_same_bits(comm, state, model):
    if comm.size != 3:  # a third is rounded
        for name, value in model.state_dict().items():
            assert torch.equal(state[name], value), name


@pytest.mark.parametrize("topology", [None, one_each], ids=["node", "one_each"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_weights_are_those_of_unsharded_torch(comm, stage, topology, made_in_place):
    reference, optimizer = make(Uses)
    steps(reference, optimizer, [1, 2, 1])
    model, optimizer = make(Uses)
    where = topology and topology(comm)
    with zerompi.partition(model, optimizer, stage=stage, comm=comm, topology=where) as zero:
        steps(model, optimizer, [1, 2, 1], zero.accumulate)
        assert_same_bits(comm, zero.full_state_dict(), reference)
    # Only of layers whose weight is used once.
    assert set(made_in_place) == {"frozen_bias.weight", "flat.weight"}
    assert not any("forward" in vars(module) for module in model.modules())


class Penalised(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(16, 16)
        self.use_bias_only = True

    def forward(self, x):
        if self.use_bias_only:
            return F.linear(x, self.layer.weight.detach(), self.layer.bias).square().mean()
        penalty = self.layer.weight.square().sum()
        return self.layer(x).square().mean() + penalty


def train_penalised(model, optimizer):
    for x in batches(2):
        model(x).backward()
        optimizer.step()
        optimizer.zero_grad()
        model.use_bias_only = False  # though the bias's gradient is all that is expected now


@pytest.mark.parametrize("stage", [1, 2])
def test_a_gradient_that_waits_for_its_other_part_survives_a_reduction(comm, stage):
    reference, optimizer = make(Penalised)
    train_penalised(reference, optimizer)
    model, optimizer = make(Penalised)
    with zerompi.partition(model, optimizer, stage=stage, comm=comm) as zero:
        train_penalised(model, optimizer)
        assert_same_bits(comm, zero.full_state_dict(), reference)


def test_a_linear_function_of_somebody_else_is_called(comm, made_in_place, monkeypatch):
    model, _ = make(lambda: nn.Linear(16, 16))
    linear, calls = F.linear, []

    def theirs(*args):
        calls.append(len(args))
        return linear(*args)

    with zerompi.partition(model, stage=1, comm=comm):
        monkeypatch.setattr(F, "linear", theirs)
        model(batches(1)[0]).sum().backward()
    assert calls == [3]
    assert made_in_place == []


def test_what_the_caller_gets_or_keeps_is_not_in_the_bucket(comm, made_in_place):
    model, optimizer = make(lambda: nn.Linear(16, 16))
    x, other = batches(2)
    with zerompi.partition(model, optimizer, stage=1, comm=comm):
        (returned,) = torch.autograd.grad(model(x).square().sum(), [model.weight])
        kept = []
        handle = model.weight.register_hook(lambda gradient: kept.append(gradient.detach()))
        model(x).square().sum().backward()
        assert made_in_place == []
        handle.remove()
        optimizer.zero_grad()
        model(other).square().sum().backward()
        assert made_in_place == ["weight"]
        assert torch.equal(returned, kept[0])
