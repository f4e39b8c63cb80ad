"""Parameters and modules of unusual kinds train like unsharded torch, at every stage."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import zerompi
from models import GLOBAL_BATCH, assert_same_weights, one_each

STAGES = [0, 1, 2, 3]
DIM = 6


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(DIM, DIM)
        self.gain = nn.Parameter(torch.tensor(1.5))
        self.empty = nn.Parameter(torch.zeros(0, 3))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gain * torch.tanh(self.linear(x)) + self.empty.sum()


class Net(nn.Module):
    """Layers, called in a way that a test chooses."""

    def __init__(self, run: Callable[[Net, Tensor, int], Tensor], layers: int = 3) -> None:
        super().__init__()
        self.first = nn.Linear(4, DIM)
        self.layers = nn.ModuleList(Layer() for _ in range(layers))
        self.last = nn.Linear(DIM, 2)
        self.run = run

    def forward(self, x: Tensor, step: int) -> Tensor:
        return self.run(self, x, step)


def in_order(net: Net, x: Tensor, step: int) -> Tensor:
    x = net.first(x)
    for layer in net.layers:
        x = layer(x)
    return net.last(x)


def frozen_in_part(net: Net) -> Net:
    net.layers[1].requires_grad_(False)
    net.layers[0].linear.bias.requires_grad_(False)
    return net


def tied_between_units(net: Net) -> Net:
    net.layers[2].linear.weight = net.layers[0].linear.weight
    net.layers[1].gain = net.layers[0].gain
    return net


def same_layer_twice(net: Net) -> Net:
    net.layers[2] = net.layers[0]
    return net


def never_used(net: Net, x: Tensor, step: int) -> Tensor:
    return net.last(net.layers[0](net.first(x)))


def used_in_some_steps(net: Net, x: Tensor, step: int) -> Tensor:
    x = net.first(x)
    for layer in list(net.layers)[: 1 + step % 3]:
        x = layer(x)
    return net.last(x)


def called_a_varying_number_of_times(net: Net, x: Tensor, step: int) -> Tensor:
    x = net.first(x)
    for _ in range(1 + step % 3):
        x = net.layers[1](x)
    return net.last(net.layers[0](x))


def out_of_order(net: Net, x: Tensor, step: int) -> Tensor:
    x = net.first(x)
    for index in (2, 0, 1) if step % 2 else (1, 2, 0):
        x = net.layers[index](x)
    return net.last(x)


def checkpointed(reentrant: bool) -> Callable[[Net, Tensor, int], Tensor]:
    def run(net: Net, x: Tensor, step: int) -> Tensor:
        x = net.first(x)
        for layer in net.layers:
            x = checkpoint(layer, x, use_reentrant=reentrant)
        return net.last(x)

    return run


def checkpointed_twice(net: Net, x: Tensor, step: int) -> Tensor:
    x = net.first(x)
    for layer in (net.layers[0], net.layers[1], net.layers[0]):
        x = checkpoint(layer, x, use_reentrant=True)
    return net.last(x)


def recomputed_as_a_whole(net: Net, x: Tensor, step: int) -> Tensor:
    def layers(x: Tensor) -> Tensor:
        for layer in net.layers:
            x = layer(x)
        return x

    return net.last(checkpoint(layers, net.first(x), use_reentrant=False))


def identity(net: Net) -> Net:
    return net


KINDS = {
    "in order": (identity, in_order),
    "frozen in part": (frozen_in_part, in_order),
    "tied between units": (tied_between_units, in_order),
    "same layer twice": (same_layer_twice, in_order),
    "never used": (identity, never_used),
    "used in some steps": (identity, used_in_some_steps),
    "called a varying number of times": (identity, called_a_varying_number_of_times),
    "out of order": (identity, out_of_order),
    "checkpointed": (identity, checkpointed(False)),
    "checkpointed, reentrant": (identity, checkpointed(True)),
    "checkpointed twice": (identity, checkpointed_twice),
    "recomputed as a whole": (identity, recomputed_as_a_whole),
}


def batch(step: int, rank: int = 0, size: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(GLOBAL_BATCH, 4, generator=generator)
    y = torch.randn(GLOBAL_BATCH, 2, generator=generator)
    n = GLOBAL_BATCH // size
    return x[rank * n : (rank + 1) * n], y[rank * n : (rank + 1) * n]


def make(kind: str, seed: int) -> tuple[Net, torch.optim.Optimizer]:
    change, run = KINDS[kind]
    torch.manual_seed(seed)
    net = change(Net(run))
    trainable = [p for p in net.parameters() if p.requires_grad]
    return net, torch.optim.AdamW(trainable, lr=1e-2)


def train(net, optimizer, steps, rank=0, size=1, reduce=lambda loss: loss):
    losses = []
    for step in range(steps):
        x, y = batch(step, rank, size)
        loss = nn.functional.mse_loss(net(x, step), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(reduce(loss.item()))
    return losses


@cache
def trained(kind):
    """Losses and model of plain torch."""
    net, optimizer = make(kind, 3)
    return train(net, optimizer, 5), net


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", KINDS)
def test_trains_like_unsharded_torch(comm, kind, stage):
    expected, reference = trained(kind)
    net, optimizer = make(kind, 3 + comm.rank)
    with zerompi.partition(net, optimizer, stage=stage, comm=comm) as zero:
        losses = train(
            net, optimizer, 5, comm.rank, comm.size, lambda loss: comm.allreduce(loss) / comm.size
        )
        state = zero.full_state_dict()
    assert losses == pytest.approx(expected, rel=1e-5)
    assert_same_weights(state, reference)


@pytest.mark.parametrize("stage", STAGES)
def test_unused_parameters_keep_no_gradient_and_are_not_decayed(comm, stage):
    net, optimizer = make("never used", 3)
    before = net.layers[2].linear.weight.detach().clone()
    with zerompi.partition(net, optimizer, stage=stage, comm=comm) as zero:
        train(net, optimizer, 2, comm.rank, comm.size)
        after = zero.full_state_dict()["layers.2.linear.weight"]
    assert torch.equal(after, before)


@pytest.mark.parametrize(("stage", "units"), [(0, None), (1, None), (2, None), (3, [])])
def test_ranks_may_use_different_parameters(comm, stage, units):
    """A parameter used on some ranks only gets the mean with zeros for the others."""
    net, optimizer = make("in order", 3)
    net.run = lambda net, x, step: net.last(net.layers[comm.rank % 3](net.first(x)))
    reference, reference_optimizer = make("in order", 3)
    with zerompi.partition(net, optimizer, stage=stage, comm=comm, units=units) as zero:
        for step in range(4):
            x, y = batch(step, comm.rank, comm.size)
            nn.functional.mse_loss(net(x, step), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            for rank in range(comm.size):
                x, y = batch(step, rank, comm.size)
                hidden = reference.layers[rank % 3](reference.first(x))
                loss = nn.functional.mse_loss(reference.last(hidden), y) / comm.size
                loss.backward()
            reference_optimizer.step()
            reference_optimizer.zero_grad()
        state = zero.full_state_dict()
    assert_same_weights(state, reference)


@pytest.mark.mpi(min_size=2)
def test_ranks_that_gather_different_units_get_an_error_that_names_them(comm):
    net, optimizer = make("in order", 3)
    net.run = lambda net, x, step: net.last(net.layers[comm.rank % 3](net.first(x)))
    zerompi.partition(net, optimizer, stage=3, comm=comm, topology=one_each(comm))
    with pytest.raises(zerompi.MismatchError, match=r"layers\.0.*layers\.1"):
        net(batch(0)[0], 0)
