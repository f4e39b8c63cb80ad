"""Units of several small blocks train like unsharded torch, however their blocks are called."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from mpi4py import MPI
from torch import nn
from torch.utils.checkpoint import checkpoint

import zerompi
from models import GLOBAL_BATCH
from zerompi import units
from zerompi.unit import UnitState

BLOCKS, DIM = 12, 6
LAYOUTS = {
    "one node": (None, "1"),
    "nodes of 1": (1, "1"),
    "nodes of 2": (2, "1"),
    "nodes of 1, messages": (1, "0"),
    "nodes of 2, messages": (2, "0"),
}


FITTING = [
    name for name, (ranks, _) in LAYOUTS.items() if ranks is None or ranks < MPI.COMM_WORLD.size
]


@pytest.fixture(params=FITTING)
def topology(request, comm, monkeypatch):
    ranks, memory = LAYOUTS[request.param]
    monkeypatch.setenv("ZEROMPI_SHARED_MEMORY", memory)
    if ranks is None:
        return None
    return zerompi.Topology(comm, ranks_per_node=ranks)


@pytest.fixture(autouse=True)
def four_units(monkeypatch):
    monkeypatch.setattr(units, "_FEWEST_UNITS", 4)


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(DIM)
        self.linear = nn.Linear(DIM, DIM)

    def forward(self, x):
        return x + torch.tanh(self.linear(self.norm(x)))


class Chain(nn.Module):
    """Twelve small blocks in four units, that `way` says how to call."""

    def __init__(self, way="plain"):
        super().__init__()
        self.way = way
        self.first = nn.Linear(DIM, DIM)
        self.blocks = nn.ModuleList(Small() for _ in range(BLOCKS))
        self.others = nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(BLOCKS))
        if way != "interleaved":
            self.others = None
        self.last = nn.Linear(DIM, 2)
        self.dropped = set()
        self.double()  # twenty layers of float32 would need loose tolerances
        if way == "tied in one unit":
            self.blocks[1].linear.weight = self.blocks[0].linear.weight
        if way == "tied across units":
            self.blocks[11].linear.weight = self.blocks[0].linear.weight
        if way == "some frozen":
            for index in (1, 3, 4, 5, 10):
                self.blocks[index].requires_grad_(False)
        if way == "only norms":
            for block in self.blocks:
                block.linear.requires_grad_(False)

    def forward(self, x):
        way = self.way
        if way != "data into the first":
            x = self.first(x)
        order = list(range(BLOCKS))
        if way == "reversed":
            order.reverse()
        if way == "shuffled":
            order = [(5 * index) % BLOCKS for index in order]
        if way == "twice":
            order = [index for index in order for _ in range(2)]
        if way == "around twice":
            order = order * 2
        for index in order:
            block = self.blocks[index]
            if index in self.dropped:
                continue
            if way == "partly without gradients" and index < 4:
                with torch.no_grad():
                    x = block(x)
            elif way == "reentrant" or (way == "some reentrant" and index % 2):
                x = checkpoint(block, x, use_reentrant=True)
            elif way == "recomputed" or (way == "some recomputed" and index % 2):
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
            if self.others is not None:
                x = torch.tanh(self.others[index](x))
        return self.last(x)


WAYS = [
    "plain", "reversed", "shuffled", "twice", "around twice", "interleaved", "reentrant",
    "some reentrant", "recomputed", "some recomputed", "partly without gradients",
    "data into the first", "tied in one unit", "tied across units", "some frozen", "only norms",
]  # fmt: skip


def data(step):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(GLOBAL_BATCH, DIM, generator=generator, dtype=torch.float64)


def loss_of(model, x, kind):
    if kind == "two forwards":
        return model(x).square().mean() + model(x + 1).mean()
    if kind == "dropped":
        return model(x).square().mean()
    if kind == "penalty":
        x = x.clone().requires_grad_()
        out = model(x).square().mean()
        (gradient,) = torch.autograd.grad(out, x, create_graph=True)
        return out + gradient.square().sum() * x.shape[0]
    if kind == "blocks alone":
        y = x
        for block in model.blocks[:8]:
            y = block(y)
        return model(x).square().mean() + y.square().mean()
    return model(x).square().mean()


def make(way, kind):
    torch.manual_seed(3)
    model = Chain(way)
    trained = [p for p in model.parameters() if p.requires_grad]
    # With the larger rate the penalty grows without bound, and with it each rounding.
    return model, torch.optim.SGD(trained, lr=0.001 if kind == "penalty" else 0.05)


def steps(model, optimizer, kind, part=slice(None)):
    """Three steps on this part of each batch."""
    for step in range(3):
        if kind == "dropped":
            model.dropped = {step, step + 1, 2 * step + 3}
        x = data(step)[part]
        with torch.no_grad():
            model(x)
        loss_of(model, x, kind).backward()
        optimizer.step()
        optimizer.zero_grad()


@cache
def unsharded(way, kind):
    """The weights after training without a partition."""
    model, optimizer = make(way, kind)
    steps(model, optimizer, kind)
    return model.state_dict()


def train(comm, topology, stage, way="plain", kind="loss", **options):
    """Train with and without a partition; the weights of both."""
    model, optimizer = make(way, kind)
    options = {"stage": stage, "comm": comm, "topology": topology, **options}
    with zerompi.partition(model, optimizer, **options) as zero:
        assert any("-" in name for name in zero.unit_names)
        n = GLOBAL_BATCH // comm.size
        steps(model, optimizer, kind, slice(comm.rank * n, (comm.rank + 1) * n))
        # Nothing stays after a step.
        assert all(unit.state is UnitState.SHARDED or unit.is_resident for unit in zero._units)
        return unsharded(way, kind), zero.full_state_dict()


def assert_alike(results):
    expected, ours = results
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-9, atol=1e-11)


@pytest.mark.cover
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("way", WAYS)
def test_merged_units_train_like_unsharded_torch(comm, topology, way, stage):
    assert_alike(train(comm, topology, stage, way))


@pytest.mark.cover
@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("kind", ["two forwards", "dropped", "penalty", "blocks alone"])
@pytest.mark.parametrize("way", ["plain", "recomputed"])
def test_merged_units_take_part_in_all_kinds_of_passes(comm, topology, way, kind, stage):
    assert_alike(train(comm, topology, stage, way, kind))


@pytest.mark.cover(1)
@pytest.mark.parametrize("way", ["plain", "interleaved", "some reentrant"])
def test_a_node_cache_of_merged_units(comm, topology, way):
    assert_alike(train(comm, topology, 3, way, node_cache=True))


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("way", ["plain", "reversed", "interleaved", "reentrant", "recomputed"])
def test_a_merged_unit_is_gathered_once_in_forward_and_once_in_backward(comm, way):
    model = Chain(way)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    topology = zerompi.Topology(comm, ranks_per_node=1)
    numel = sum(p.numel() for p in model.parameters())
    with zerompi.partition(model, optimizer, comm=comm, topology=topology) as zero:
        for _ in range(3):
            model(data(0)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        traffic = zero.report().traffic
    sent = comm.allreduce(sum(traffic["all_gather"].values()))
    assert sent == 8 * 2 * numel * (comm.size - 1)
    reduced = comm.allreduce(sum(traffic["reduce_scatter"].values()))
    assert reduced == 8 * numel * (comm.size - 1)


def test_a_forward_that_raises_leaves_nothing_behind(comm, topology):
    model = Chain()
    with zerompi.partition(model, comm=comm, topology=topology) as zero:
        handle = model.blocks[7].register_forward_hook(lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(data(0))
        assert all(unit.state is UnitState.SHARDED or unit.is_resident for unit in zero._units)
        handle.remove()
        model(data(0)).sum().backward()


def test_gathered_shows_one_block_of_a_merged_unit(comm, topology):
    torch.manual_seed(1)
    model = Chain()
    weight = model.blocks[4].linear.weight.detach().clone()
    with zerompi.partition(model, comm=comm, topology=topology) as zero:
        with zero.gathered(model.blocks[4]):
            assert torch.equal(model.blocks[4].linear.weight, weight)
            model.blocks[5](data(0))
        with zero.gathered(model.blocks[4], writable=True):
            model.blocks[4].linear.weight.data.fill_(2.0)
        state = zero.full_state_dict()
    assert torch.equal(state["blocks.4.linear.weight"], torch.full_like(weight, 2.0))


def test_writing_one_block_of_a_meta_model_leaves_the_others_without_values(comm):
    with torch.device("meta"):
        model = nn.Sequential(*(Unfilled() for _ in range(8)))
    with zerompi.partition(model, comm=comm) as zero:
        assert len(zero.unit_names) < 8
        with zero.gathered(model[0], writable=True):
            model[0].weight.data.fill_(1.0)
        with pytest.raises(zerompi.ZerompiError, match=r"7 tensors .* have no values yet"):
            model(torch.ones(2))


class Unfilled(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(2))

    def forward(self, x):
        return x * self.weight


@pytest.mark.mpi(min_size=2)
def test_ranks_may_run_different_numbers_of_batches(comm, topology):
    torch.manual_seed(1)
    model = Chain()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with zerompi.partition(model, optimizer, comm=comm, topology=topology) as zero:
        with zero.join():
            for step in range(2 + comm.rank):
                model(data(step)).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
        ours = zero.full_state_dict()
    torch.manual_seed(1)
    reference = Chain()
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.05)
    for step in range(1 + comm.size):  # all that still run have the same batch
        reference(data(step)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_alike((reference.state_dict(), ours))


@pytest.mark.cover(1)
@pytest.mark.parametrize("stage", [2, 3])
def test_a_checkpoint_does_not_know_of_merging(comm, topology, stage, tmp_path):
    path = comm.bcast(str(tmp_path / "saved"))
    torch.manual_seed(1)
    states = []
    for chosen in (lambda module: isinstance(module, Small), None):
        model = Chain()
        optimizer = torch.optim.Adam(model.parameters())
        zero = zerompi.partition(
            model, optimizer, stage=stage, comm=comm, topology=topology, units=chosen
        )
        if chosen is None:
            zero.load(path)
        else:
            model(data(0)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            zero.save(path)
        model(data(1)).square().mean().backward()
        optimizer.step()
        states.append(zero.full_state_dict())
        zero.close()
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-9, atol=1e-11)


class Heads(nn.Module):
    """A large embedding that is read without a call of it, and a head that one rank leaves out."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(40, DIM)
        self.blocks = nn.ModuleList(Small() for _ in range(2))
        self.head = nn.Linear(DIM, 5)
        self.double()

    def forward(self, tokens, *, with_head=True):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        loss = (x @ self.embedding.weight.T).square().mean()
        return loss + self.head(x).square().mean() if with_head else loss


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_large_modules_outside_of_blocks_train_like_unsharded_torch(
    comm, topology, monkeypatch, stage
):
    monkeypatch.setattr(units, "_LARGE_NBYTES", 100)
    tokens = torch.arange(24).reshape(12, 2)
    results = []
    for sharded in (False, True):
        torch.manual_seed(3)
        model = Heads()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        if sharded:
            zero = zerompi.partition(model, optimizer, stage=stage, comm=comm, topology=topology)
            assert ("head" in zero.unit_names) == ("embedding" in zero.unit_names) == (stage < 3)
        for _ in range(3):
            if sharded:
                model(tokens, with_head=comm.rank != comm.size - 1).backward()
            else:
                losses = [
                    model(tokens, with_head=rank != comm.size - 1) for rank in range(comm.size)
                ]
                (sum(losses) / comm.size).backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(zero.full_state_dict() if sharded else model.state_dict())
    zero.close()
    assert_alike(results)
