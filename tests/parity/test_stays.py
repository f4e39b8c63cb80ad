"""reshard_last=False at stage 3: what a forward uses last stays until the backward, if it is not out of date."""

from __future__ import annotations

from contextlib import nullcontext
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import zerompi
from models import CASES, Block, build, one_each, own_slice
from zerompi import Quantize, place
from zerompi.accounting import message_nbytes

pytestmark = pytest.mark.mpi(min_size=2)

CASE = CASES["gpt"]


def layout(comm, name):
    """Nothing is shared; or nodes of two."""
    return one_each(comm) if name == "each" else zerompi.Topology(comm, ranks_per_node=2)


def numel_of(model):
    return sum(p.numel() for p in model.parameters())


class Chain(nn.Module):
    """Blocks that are called in an order, and in a way, that a switch outside decides."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block(20, 2) for _ in range(4))
        self.order = [0, 1, 2, 3]
        self.way = "plain"
        self.fails_at = None

    def forward(self, x):
        for position, index in enumerate(self.order):
            if position == self.fails_at:
                raise ArithmeticError("in the middle of a forward")
            if self.way == "plain":
                x = self.blocks[index](x)
            else:
                x = checkpoint(self.blocks[index], x, use_reentrant=self.way == "reentrant")
        if self.fails_at == len(self.order):
            raise ArithmeticError("at the end of a forward")
        return x


def chain():
    torch.manual_seed(5)
    model = Chain()
    return model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def data(comm, step):
    generator = torch.Generator().manual_seed(step * comm.size + comm.rank)
    return torch.randn(2, 3, 20, generator=generator).requires_grad_()


# -- the same numbers --------------------------------------------------------------------------


def passes(model, optimizer, zero, comm, kind):
    """Losses of some steps, with all that may come between a forward and its backward."""
    losses = []
    for step in range(3):
        if kind == "accumulate":
            with zero.accumulate(2):
                for half in range(2):
                    loss = model(data(comm, 2 * step + half)).square().mean()
                    loss.backward()
        elif kind == "two forwards":
            first, second = model(data(comm, step)), model(data(comm, step + 9))
            loss = first.square().mean() + second.mean()
            loss.backward()
        elif kind == "evaluation between":
            loss = model(data(comm, step)).square().mean()
            with torch.no_grad():
                losses.append(model(data(comm, 0)).mean().item())
            loss.backward()
        else:
            loss = model(data(comm, step)).square().mean()
            loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
        if kind == "evaluation between steps":
            with torch.no_grad():
                losses.append(model(data(comm, 0)).mean().item())
    return losses


@pytest.mark.cover
@pytest.mark.parametrize("node_cache", [False, True])
@pytest.mark.parametrize("nodes", ["each", "of two"])
@pytest.mark.parametrize("way", ["plain", "reentrant", "recomputed"])
@pytest.mark.parametrize(
    "kind",
    ["plain", "accumulate", "two forwards", "evaluation between", "evaluation between steps"],
)
@pytest.mark.parametrize("together", [False, True])
def test_losses_and_weights_are_those_without_staying(
    comm, monkeypatch, together, kind, way, nodes, node_cache
):
    monkeypatch.setattr(place, "_GATHER_PART", 0.6 if together else 0)
    results = []
    options = {"comm": comm, "topology": layout(comm, nodes), "node_cache": node_cache}
    for stays in (True, False):
        model, optimizer = chain()
        model.way = way
        with zerompi.partition(model, optimizer, reshard_last=not stays, **options) as zero:
            losses = passes(model, optimizer, zero, comm, kind)
            results.append((losses, zero.full_state_dict()))
            # One of four blocks, or two that are gathered together; what the node has keeps its place.
            is_shared = zero.num_copies < comm.size
            blocks = (2 if together else 1) * (2 if kind == "accumulate" else 1)
            if not stays or zero.num_copies == 1 or (node_cache and is_shared):
                blocks = 0
            assert zero.report().spared == blocks * numel_of(model.blocks[0]) * 4
    (losses, state), (expected_losses, expected_state) = results
    assert losses == expected_losses
    assert all(torch.equal(state[name], value) for name, value in expected_state.items())


# -- bytes -------------------------------------------------------------------------------------


class Steps:
    """Runs steps of a chain, every rank a node, and counts the blocks that all ranks gather in each."""

    def __init__(self, comm):
        self.comm = comm
        self.model, self.optimizer = chain()
        self.zero = zerompi.partition(
            self.model, self.optimizer, comm=comm, topology=one_each(comm), reshard_last=False
        )
        self.number = 0

    def forward(self):
        self.number += 1
        return self.model(data(self.comm, self.number))

    def end(self):
        """Step; return how many blocks were gathered in it, and how many were spared."""
        self.optimizer.step()
        self.optimizer.zero_grad()
        report = self.zero.report()
        of_block = 4 * numel_of(self.model.blocks[0])
        sent = self.comm.allreduce(sum(report.traffic["all_gather"].values()))
        assert sent % (of_block * (self.comm.size - 1)) == 0
        return sent // (of_block * (self.comm.size - 1)), report.spared // of_block

    def run(self, order=(0, 1, 2, 3)):
        self.model.order = list(order)
        self.forward().square().mean().backward()
        return self.end()


@pytest.fixture
def steps(comm, monkeypatch):
    monkeypatch.setattr(place, "_GATHER_PART", 0)
    made = Steps(comm)
    yield made
    made.zero.close()


def test_what_stays_is_gathered_once_when_the_order_is_known(steps):
    assert [steps.run() for _ in range(3)] == [(8, 0), (7, 1), (7, 1)]


def test_bytes_with_evaluations_between(steps):
    """An evaluation gathers once, and nothing stays of it; the forward after it is another pass."""
    counted = []
    for _ in range(3):
        counted.append(steps.run())
        with torch.no_grad():
            steps.forward()
    assert counted == [(8, 0), (12, 0), (11, 1)]


def test_bytes_of_steps_in_another_order(steps):
    """What was gathered ahead for nothing is counted; what is used again in forward stays, too."""
    for _ in range(2):
        steps.run()
    # 2 comes ahead for nothing, then 3 in its stead; later 3 comes ahead for nothing.
    assert [steps.run([0, 1, 3]) for _ in range(2)] == [(7, 0), (5, 1)]
    assert [steps.run() for _ in range(2)] == [(9, 0), (7, 1)]
    # 1 comes ahead for nothing, where 0 comes again; then 0 stays in forward, too, but not in backward.
    assert [steps.run([0, 0, 1]) for _ in range(2)] == [(7, 0), (4, 2)]


def test_bytes_after_a_forward_that_fails(steps):
    for _ in range(2):
        steps.run()
    steps.model.fails_at = 2
    with pytest.raises(ArithmeticError):
        steps.forward()  # gathers 0, 1, and 2 ahead
    steps.model.fails_at = None
    # Another pass than the known first one of a step; then the known one is that which failed.
    assert [steps.run() for _ in range(3)] == [(3 + 8, 0), (8, 0), (7, 1)]


@pytest.mark.parametrize("options", [{}, {"node_cache": True}, {"quantize": Quantize(block=64)}])
def test_bytes_on_two_nodes_are_the_theory(comm, monkeypatch, options):
    """All of it for forward; for backward but for the root and the last block."""
    if comm.size != 4:
        pytest.skip("needs 4 ranks")
    monkeypatch.setenv("ZEROMPI_SHARED_MEMORY", "0")
    model, optimizer = build(CASE)
    x, y = own_slice(CASE.batch(0), comm.rank, comm.size)
    options = {
        "topology": zerompi.Topology(comm, ranks_per_node=2),
        "reshard_last": False,
        **options,
    }
    with zerompi.partition(model, optimizer, comm=comm, **options) as zero:
        for _ in range(2):
            CASE.loss(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        report, whole = zero.report(), zero.message_nbytes.parameters
        root, *_, last = zero._units
    stays = message_nbytes([root, last]).parameters
    assert report.spared == stays
    sent = {k: comm.allreduce(v) for k, v in sorted(report.traffic["all_gather"].items())}
    between = whole if "node_cache" in options else 2 * whole - stays
    # Both nodes pass on, among their two ranks, what each of these has of it.
    assert sent == {"inter_node": between, "intra_node": 2 * (2 * whole - stays)}


# -- never out of date -------------------------------------------------------------------------


def plain_output(zero, x):
    """What the unsharded model with the present weights says."""
    model, _ = chain()
    model.load_state_dict(zero.full_state_dict())
    return model(x)


def test_a_forward_sees_the_weights_that_are(steps, comm):
    """Whatever an earlier forward, without a backward, has left."""
    zero, model, x = steps.zero, steps.model, data(comm, 0)
    outputs = []

    def leave_something(fails_at=None):
        """A forward in the known order without a backward; gradients of the step before are there."""
        for _ in range(3):
            steps.run()
        steps.forward().square().mean().backward()
        steps.optimizer.step()
        model.fails_at = fails_at
        with nullcontext() if fails_at is None else pytest.raises(ArithmeticError):
            model(x)
        model.fails_at = None
        assert zero._units[-1].gather is not None

    def check():
        assert torch.equal(model(x), plain_output(zero, x))
        with torch.no_grad():
            outputs.append(model(x))
        assert torch.equal(outputs[-1], plain_output(zero, x))

    leave_something()
    check()
    leave_something()
    steps.optimizer.step()
    check()
    leave_something()
    zero.load_full_state_dict({k: 1.5 * v for k, v in zero.full_state_dict().items()})
    check()
    leave_something(fails_at=4)  # at the end of the forward: its last block has stayed
    with zero.gathered(writable=True):
        for parameter in model.parameters():
            parameter.data.mul_(0.5)
    check()
    assert not any(torch.equal(*pair) for pair in pairwise(outputs))


def test_what_stays_reads_as_nothing_and_takes_no_more_memory(comm, monkeypatch):
    monkeypatch.setenv("ZEROMPI_COMM_THREAD", "0")  # a late thread may lower a peak
    peaks = []
    options = {"comm": comm, "topology": one_each(comm)}
    for reshard_last in (False, True):
        model, optimizer = build(CASE)
        x, y = own_slice(CASE.batch(0), comm.rank, comm.size)
        with zerompi.partition(model, optimizer, reshard_last=reshard_last, **options) as zero:
            for _ in range(3):
                loss = CASE.loss(model(x), y)
                assert all(p.isnan().all() for p in model.parameters())
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            memory = zero.report().memory
            peaks.append((memory.peak, memory.now))
            assert not any(unit.gather for unit in zero._units)
            assert (zero.report().spared > 0) != reshard_last
    assert peaks[0] == peaks[1]


# -- the argument ------------------------------------------------------------------------------


def test_wrong_arguments(comm):
    model, optimizer = chain()
    with pytest.raises(TypeError, match="reshard_last: expected True or False, got 0"):
        zerompi.partition(model, optimizer, comm=comm, reshard_last=0)
    with pytest.raises(zerompi.MismatchError, match=r"reshard_last True.*reshard_last False"):
        zerompi.partition(model, optimizer, comm=comm, reshard_last=not comm.rank)


@pytest.mark.parametrize("refresh", ["eager", "ahead"])
def test_below_stage_3_it_changes_nothing(comm, refresh):
    traffic = []
    for reshard_last in (False, True):
        model, optimizer = chain()
        options = {"stage": 2, "refresh": refresh, "reshard_last": reshard_last}
        with zerompi.partition(
            model, optimizer, comm=comm, topology=one_each(comm), **options
        ) as zero:
            losses = passes(model, optimizer, zero, comm, "plain")
            traffic.append((losses, zero.report().traffic))
            assert zero.report().spared == 0
    assert traffic[0] == traffic[1]
