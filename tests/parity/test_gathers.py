"""Where gathered parameters lie and when they come: slots, batches, prefetch, node_cache (stage 3)."""

from __future__ import annotations

from contextlib import nullcontext
from copy import deepcopy

import pytest
import torch
from mpi4py import MPI
from torch import nn
from torch.utils.checkpoint import checkpoint

import zerompi
from models import CASES, GPT, Block, assert_same_weights, build, own_slice
from test_stages import assert_trains_alike
from zerompi import place, schedule
from zerompi.collectives import shared

LAYOUTS = [[2, 2], [3, 1], [1, 1, 1, 1], [2, 1], [1, 1], [1]]
# Whether the ranks of a node share memory; alone on it, they have nobody to share it with.
FITTING = [
    (sizes, memory)
    for sizes in LAYOUTS
    for memory in ("shared", "messages")
    if sum(sizes) == MPI.COMM_WORLD.size and (memory == "messages") <= (max(sizes) > 1)
]


@pytest.fixture(params=FITTING, ids=lambda case: "+".join(map(str, case[0])) + f" {case[1]}")
def topology(request, comm, monkeypatch):
    sizes, memory = request.param
    monkeypatch.setenv("ZEROMPI_SHARED_MEMORY", "1" if memory == "shared" else "0")
    return zerompi.Topology(comm, ranks_per_node=sizes)


@pytest.mark.cover(1)
@pytest.mark.parametrize("name", ["tied", "mlp", "lora"])
def test_a_node_cache_trains_like_unsharded_torch(comm, topology, name):
    assert_trains_alike(comm, name, 3, steps=4, topology=topology, node_cache=True)


class Nested(nn.Module):
    """Units in units in units, of several sizes; the inner ones are used in the reverse order, too."""

    def __init__(self):
        super().__init__()
        self.groups = nn.ModuleList(nn.ModuleList(Block(20, 2) for _ in range(2)) for _ in range(2))
        self.gains = nn.ParameterList(nn.Parameter(torch.ones(20)) for _ in range(2))

    def forward(self, x):
        for group, gain in zip(self.groups, self.gains, strict=True):
            for block in group:
                x = block(x) * gain
            for block in reversed(group):
                x = x + block(x)
        return x


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(20))
        self.inner = Nested()

    def forward(self, x):
        return self.inner(x) * self.scale


def train(model, optimizer, comm, steps=3, zero=None):
    generator = torch.Generator().manual_seed(3)
    for _ in range(steps):
        x, y = torch.randn(2, 12, 5, 20, generator=generator)
        share = slice(None)
        if zero is not None:
            n = 12 // comm.size
            share = slice(comm.rank * n, (comm.rank + 1) * n)
        nn.functional.mse_loss(model(x[share]), y[share]).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.cover
@pytest.mark.parametrize("node_cache", [False, True])
@pytest.mark.parametrize("deep", [False, True])
def test_nested_units_train_like_unsharded_torch(comm, topology, node_cache, deep):
    kinds = (Block, Nested, nn.Linear) if deep else (Block, Nested)

    def make():
        torch.manual_seed(1)
        model = Outer()
        return model, torch.optim.SGD(model.parameters(), lr=1e-4)

    expected, optimizer = make()
    train(expected, optimizer, comm)
    model, optimizer = make()
    with zerompi.partition(
        model,
        optimizer,
        comm=comm,
        topology=topology,
        units=lambda module: isinstance(module, kinds),
        node_cache=node_cache,
    ) as zero:
        train(model, optimizer, comm, zero=zero)
        state = zero.full_state_dict()
    assert_same_weights(state, expected)


def counted(zero):
    return {
        level: sum(nbytes.get(level, 0) for label, nbytes in zero.report().traffic.items()
                   if label != "header")
        for level in ("intra_node", "inter_node")
    }  # fmt: skip


def gpt_step(comm, model, optimizer, passes=1):
    case = CASES["gpt"]
    x, y = own_slice(case.batch(0), comm.rank, comm.size)
    for _ in range(passes):
        case.loss(model(x), y).backward()
    optimizer.step()
    optimizer.zero_grad()


# Elements sent between nodes per step by all ranks together, in units of Psi times (nodes - 1),
# where L ranks are on each node: all-gathers, reduce-scatter.
BETWEEN_NODES = {
    "flat": lambda ranks: (2 * ranks, ranks),  # every rank of the other node gets each block
    "hierarchical": lambda ranks: (2, 1),
    "node_cache": lambda ranks: (1, 1),
    "shard_ranks": lambda ranks: (0, 2),  # an all-reduce between the copies
}


@pytest.mark.cover
@pytest.mark.mpi(min_size=4)
@pytest.mark.parametrize("memory", ["1", "0"])
@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.parametrize("way", BETWEEN_NODES)
def test_bytes_between_nodes_are_the_theory(comm, monkeypatch, memory, way, passes):
    monkeypatch.setenv("ZEROMPI_SHARED_MEMORY", memory)
    if comm.size != 4:
        pytest.skip("needs 4 ranks")
    options = {"node_cache": way == "node_cache"}
    if way == "shard_ranks":
        options["shard_ranks"] = "node"
    nodes = [0, 0, 1, 1]
    topology = zerompi.Topology.from_nodes(nodes)
    if way == "flat":  # every rank for itself; what crosses is told by who would be on which node
        topology = zerompi.Topology(comm, ranks_per_node=1)
    model, optimizer = build(CASES["gpt"])
    numel = sum(p.numel() for p in model.parameters())
    with zerompi.partition(model, optimizer, comm=comm, topology=topology, **options) as zero:
        for _ in range(3):
            gpt_step(comm, model, optimizer, passes)
        sent = counted(zero)
    between = comm.allreduce(sent["inter_node"])
    gathers, reductions = BETWEEN_NODES[way](2)
    gathers *= passes if way != "node_cache" else 1
    reductions *= passes
    if way == "flat":  # of a rank's three peers, two are on the other node
        between = between * 2 // 3
    assert between == pytest.approx(4 * numel * (gathers + reductions), abs=0)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_groups_of_nodes_train_like_unsharded_torch(comm, stage):
    if comm.size < 3:
        pytest.skip("needs 3 ranks")
    topology = zerompi.Topology(comm, ranks_per_node=1, nodes_per_group=2)
    assert_trains_alike(comm, "gpt", stage, steps=6, topology=topology)


@pytest.mark.parametrize("stage", [2, 3])
def test_bytes_between_groups_of_nodes_are_the_theory(comm, stage):
    """Every block enters the other group once, and every other node of a group once."""
    if comm.size != 4:
        pytest.skip("needs 4 ranks")
    topology = zerompi.Topology.from_nodes([0, 1, 2, 3], [0, 0, 1, 1])
    model, optimizer = build(CASES["gpt"])
    numel = sum(p.numel() for p in model.parameters())
    with zerompi.partition(model, optimizer, stage=stage, comm=comm, topology=topology) as zero:
        for _ in range(2):
            gpt_step(comm, model, optimizer)
        traffic = zero.report().traffic
    times = {"reduce_scatter": 1, **({"all_gather": 2} if stage == 3 else {"refresh": 1})}
    for label, count in times.items():
        sent = {level: comm.allreduce(nbytes) for level, nbytes in sorted(traffic[label].items())}
        # Of two groups of two nodes: Psi crosses; each group then passes on all blocks: 2 Psi.
        assert sent == {"inter_group": 4 * count * numel, "inter_node": 4 * count * 2 * numel}


@pytest.mark.mpi(min_size=2)
def test_each_unit_is_gathered_ahead_once_its_order_is_known(comm, topology, monkeypatch):
    made = []

    class Watched(schedule.Gather):
        def __init__(self, units, context, *, ahead):
            made.append((len(units), ahead))
            super().__init__(units, context, ahead=ahead)

    monkeypatch.setattr(schedule, "Gather", Watched)
    monkeypatch.setattr(place, "_GATHER_NBYTES", 0)
    model, optimizer = build(CASES["gpt"])
    with zerompi.partition(model, optimizer, comm=comm, topology=topology) as zero:
        if zero.num_copies == 1:
            return  # nothing is ever gathered
        gpt_step(comm, model, optimizer)
        assert not made  # unknown yet
        gpt_step(comm, model, optimizer)
    # The root and three blocks, in forward and in backward.
    assert made == [(1, True)] * 8


@pytest.mark.mpi(min_size=2)
def test_small_units_are_gathered_together(comm, topology):
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(6, 6) for _ in range(48)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with zerompi.partition(
        model, optimizer, units=list(model), comm=comm, topology=topology
    ) as zero:
        headers = []
        for _ in range(3):
            model(torch.ones(2, 6)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            headers.append(sum(zero.report().traffic["header"].values()))
    if zero.num_copies > 1:
        assert headers[1] == headers[2] <= headers[0] - 16 * (comm.size - 1) * 60


class Switching(nn.Module):
    """Uses its blocks in an order that a switch outside decides."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block(20, 2) for _ in range(4))
        self.order = [0, 1, 2, 3]

    def forward(self, x):
        for index in self.order:
            x = self.blocks[index](x)
        return x


@pytest.mark.cover(1)  # when units are gathered, and where they lie
@pytest.mark.parametrize("part", [0, 0.5, 1])
def test_passes_that_leave_the_known_order_are_right(comm, topology, monkeypatch, part):
    monkeypatch.setattr(place, "_GATHER_PART", part)
    orders = [[0, 1, 2, 3], [0, 1, 2, 3], [0, 2, 1, 3], [3], [1, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3]]
    weights = []
    for sharded in (False, True):
        torch.manual_seed(5)
        model = Switching()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        zero = (
            zerompi.partition(model, optimizer, comm=comm, topology=topology) if sharded else None
        )
        for order in orders:
            model.order = order
            with torch.no_grad():
                model(torch.ones(1, 3, 20))  # another pass of the same step
            generator = torch.Generator().manual_seed(len(order))
            x = torch.randn(12, 3, 20, generator=generator)
            n = 12 // comm.size
            part = x[comm.rank * n : (comm.rank + 1) * n] if sharded else x
            model(part).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        weights.append(model.state_dict() if zero is None else zero.full_state_dict())
        if zero is not None:
            zero.close()
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("node_cache", [False, True])
def test_a_forward_inside_gathered_and_an_unfinished_pass_leave_nothing(comm, topology, node_cache):
    model, optimizer = build(CASES["gpt"])
    x, _ = own_slice(CASES["gpt"].batch(0), comm.rank, comm.size)
    with zerompi.partition(
        model, optimizer, comm=comm, topology=topology, node_cache=node_cache
    ) as zero:
        buffers = []
        for _ in range(4):
            gpt_step(comm, model, optimizer)
            buffers.append(zero.report().memory.now["buffers"])
            with zero.gathered():
                inside = model(x)
            unfinished = model(x)  # recorded, but no backward follows
            assert torch.equal(inside, unfinished)
            with torch.no_grad():
                assert torch.equal(model(x), inside)
        state = zero.full_state_dict()
    reference = GPT()
    reference.load_state_dict(state)
    assert torch.equal(reference(x), unfinished)
    assert len(set(buffers)) == 1


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_node_cache_without_gathers_is_refused(comm, stage):
    model, optimizer = build(CASES["gpt"])
    with pytest.raises(ValueError, match=f"node_cache: expected False at stage {stage}"):
        zerompi.partition(model, optimizer, stage=stage, comm=comm, node_cache=True)


def test_a_forward_of_one_rank_inside_gathered_changes_no_order(comm, topology):
    model, optimizer = build(CASES["gpt"])
    x, _ = own_slice(CASES["gpt"].batch(0), comm.rank, comm.size)
    with zerompi.partition(model, optimizer, comm=comm, topology=topology) as zero:
        for _ in range(3):
            gpt_step(comm, model, optimizer, passes=2)
            with zero.gathered():
                if comm.rank == 0:
                    model(x)


def test_inference_mode_leaves_training_alone(comm, topology):
    model, optimizer = build(CASES["gpt"])
    x, _ = own_slice(CASES["gpt"].batch(0), comm.rank, comm.size)
    with zerompi.partition(model, optimizer, comm=comm, topology=topology):
        for _ in range(3):
            gpt_step(comm, model, optimizer)
            with torch.inference_mode():
                model(x)


@pytest.mark.parametrize("node_cache", [False, True])
def test_a_penalty_on_gathered_parameters_has_the_right_gradient(comm, topology, node_cache):
    """Views that autograd saves inside gathered() are read after it, when the slots are others'."""

    def step(model, optimizer, part, gather):
        with gather():
            penalty = sum((b.down.weight @ b.down.weight.T).square().sum() for b in model.blocks)
        x, y = part
        (CASES["gpt"].loss(model(x), y) + 0.1 * penalty).backward()
        optimizer.step()
        optimizer.zero_grad()

    expected, optimizer = build(CASES["gpt"], "sgd")
    for _ in range(3):
        step(expected, optimizer, CASES["gpt"].batch(0), nullcontext)
    model, optimizer = build(CASES["gpt"], "sgd")
    with zerompi.partition(
        model, optimizer, comm=comm, topology=topology, node_cache=node_cache
    ) as zero:
        for _ in range(3):
            step(
                model,
                optimizer,
                own_slice(CASES["gpt"].batch(0), comm.rank, comm.size),
                zero.gathered,
            )
        state = zero.full_state_dict()
    assert_same_weights(state, expected)


@pytest.mark.parametrize(("stage", "node_cache"), [(1, False), (2, False), (3, False), (3, True)])
def test_copies_of_which_some_lie_on_one_node(comm, stage, node_cache):
    if comm.size != 4:
        pytest.skip("needs 4 ranks")
    topology = zerompi.Topology(comm, ranks_per_node=[3, 1])
    options = {"shard_ranks": 2, "topology": topology, "node_cache": node_cache}
    assert_trains_alike(comm, "gpt", stage, steps=4, **options)


@pytest.mark.parametrize("param_dtype", [None, torch.bfloat16])
def test_what_one_rank_has_alone_is_not_gathered(comm, param_dtype):
    """Neither a second copy nor a placeholder, until the partition is closed."""
    model, optimizer = build(CASES["gpt"])
    weight = model.blocks[0].up.weight
    precision = zerompi.MixedPrecision(param_dtype=param_dtype)
    options = {"shard_ranks": 1, "mixed_precision": precision}
    with zerompi.partition(model, optimizer, comm=comm, **options) as zero:
        gpt_step(comm, model, optimizer)
        expected = zero.full_state_dict()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter, expected[name].to(parameter.dtype))
        address = weight.data_ptr()
        gpt_step(comm, model, optimizer)
        assert weight.data_ptr() == address
        memory, numel = zero.report().memory, sum(p.numel() for p in model.parameters())
        assert memory.peak["parameters"] == pytest.approx(weight.itemsize * numel, rel=0.02)
        assert "all_gather" not in zero.report().traffic
    assert weight.isnan().all()


@pytest.mark.cover(1)
@pytest.mark.parametrize("name", ["tied", "mlp", "lora"])
def test_a_copy_on_every_rank_trains_like_unsharded_torch(comm, topology, name):
    assert_trains_alike(comm, name, 3, steps=4, topology=topology, shard_ranks=1)


def test_closing_frees_the_shared_memory(comm, monkeypatch):
    windows, freed = [], []

    class Watched(shared.Window):
        def __init__(self, comm, part_nbytes):
            super().__init__(comm, part_nbytes)
            windows.append(self)

        def close(self):
            super().close()
            freed.append(self._win == MPI.WIN_NULL)

    monkeypatch.setattr(place, "Window", Watched)
    monkeypatch.setattr(shared, "Window", Watched)
    topology = zerompi.Topology(comm, ranks_per_node=2)
    model, optimizer = build(CASES["gpt"])
    with zerompi.partition(model, optimizer, comm=comm, topology=topology):
        gpt_step(comm, model, optimizer)
    assert len(freed) == len(windows)
    assert all(freed)


class Experts(nn.Module):
    """A block of which each caller uses a part only."""

    def __init__(self, width=6):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.experts = nn.ModuleList(nn.Linear(width, width) for _ in range(3))

    def forward(self, x, choice):
        """With choice 0 mod 4 all experts are used, else one."""
        chosen = self.experts if choice % 4 == 0 else [self.experts[choice % 4 - 1]]
        return x + sum(expert(self.norm(x)).tanh() for expert in chosen)


class MixtureOfExperts(nn.Module):
    def __init__(self, recompute):
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.blocks = nn.ModuleList(Experts() for _ in range(5))
        self.recompute = recompute

    def forward(self, x, choice):
        x = self.first(x)
        for number, block in enumerate([*self.blocks, self.blocks[1]]):
            if self.recompute is None:
                x = block(x, choice + number)
            else:
                x = checkpoint(block, x, choice + number, use_reentrant=self.recompute)
        return x


@pytest.mark.cover(1)
@pytest.mark.parametrize("recompute", [None, False, True])
def test_ranks_may_use_different_parameters_of_a_unit(comm, topology, recompute):
    torch.manual_seed(2)
    expected = MixtureOfExperts(recompute)
    model = deepcopy(expected)
    expected_optimizer = torch.optim.SGD(expected.parameters(), lr=0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with zerompi.partition(
        model, optimizer, comm=comm, topology=topology, units=lambda m: isinstance(m, Experts)
    ) as zero:
        for step in range(4):
            choices = [rank + step // 2 for rank in range(comm.size)]
            x = torch.randn(comm.size, 4, 6, generator=torch.Generator().manual_seed(step))
            model(x[comm.rank], choices[comm.rank]).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            losses = [expected(x[r], choices[r]).square().mean() for r in range(comm.size)]
            torch.stack(losses).mean().backward()
            expected_optimizer.step()
            expected_optimizer.zero_grad()
        assert_same_weights(zero.full_state_dict(), expected)
