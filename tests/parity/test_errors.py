"""Wrong arguments and ranks that disagree: one clear error on every rank, no hang."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import zerompi
from models import CASES, assert_same_weights, build, own_slice


def last(comm) -> bool:
    return comm.rank == comm.size - 1


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"stage": 4}, ValueError, "stage: expected 0, 1, 2 or 3, got 4"),
        ({"stage": True}, ValueError, "stage: expected 0, 1, 2 or 3, got True"),
        ({"shard_ranks": "rack"}, ValueError, "shard_ranks: expected 'world', 'node' or a number"),
        ({"shard_ranks": 5}, ValueError, "shard_ranks: expected a divisor of"),
        ({"units": 3}, TypeError, "units: expected a sequence of modules, a predicate or None"),
        ({"units": [nn.Linear(1, 1)]}, ValueError, "units: expected modules of the model"),
        ({"mixed_precision": torch.bfloat16}, TypeError, "mixed_precision: expected zerompi.Mixed"),
        ({"comm": "world"}, TypeError, "comm: expected an MPI intra-communicator, got str"),
    ],
)
def test_wrong_arguments_are_refused(comm, arguments, error, message):
    model, optimizer = build(CASES["mlp"])
    with pytest.raises(error, match=message):
        zerompi.partition(model, optimizer, **{"comm": comm, **arguments})


def test_wrong_models_and_optimizers_are_refused(comm):
    model, optimizer = build(CASES["mlp"])
    with pytest.raises(TypeError, match="model: expected a torch module, got function"):
        zerompi.partition(lambda x: x, optimizer, comm=comm)
    with pytest.raises(TypeError, match="optimizer: expected a torch.optim.Optimizer or None"):
        zerompi.partition(model, model, comm=comm)
    stranger = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    with pytest.raises(ValueError, match="optimizer: expected parameters of the model"):
        zerompi.partition(model, stranger, comm=comm)
    zero = zerompi.partition(model, optimizer, comm=comm)
    with pytest.raises(ValueError, match="model: expected parameters that are not partitioned yet"):
        zerompi.partition(model, comm=comm)
    zero.close()


class Descent(torch.optim.Optimizer):
    """An optimizer of a user's own; a subclass says in which direction."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(self.direction(p.grad), alpha=group["lr"])


class Whitening(Descent):
    """Needs whole tensors: divides each gradient by its norm, as LAMB and Muon do in their ways."""

    def direction(self, gradient):
        return gradient / gradient.norm()


class SignSGD(Descent):
    """Elementwise."""

    def direction(self, gradient):
        return gradient.sign()


def train_beside(comm, case, whole, part, steps):
    """`steps` steps of an unsharded (model, optimizer), and of a partitioned one on this rank's part."""
    for step in range(steps):
        batch = case.batch(step)
        for (model, optimizer), (x, y) in (
            (whole, batch),
            (part, own_slice(batch, comm.rank, comm.size)),
        ):
            case.loss(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("optimizer", [Whitening, torch.optim.Adafactor])
def test_optimizers_that_need_whole_tensors_are_refused_where_states_are_cut(
    comm, stage, optimizer
):
    model, _ = build(CASES["mlp"])
    with pytest.raises((TypeError, zerompi.ZerompiError), match=r"use stage=0 for it"):
        zerompi.partition(model, optimizer(model.parameters(), lr=0.1), stage=stage, comm=comm)


def test_optimizers_that_need_whole_tensors_work_at_stage_0(comm):
    case = CASES["mlp"]
    reference, _ = build(case)
    model, _ = build(case)
    theirs = Whitening(reference.parameters(), lr=0.01)
    ours = Whitening(model.parameters(), lr=0.01)
    with zerompi.partition(model, ours, stage=0, comm=comm) as zero:
        train_beside(comm, case, (reference, theirs), (model, ours), 3)
        state = zero.full_state_dict()
    assert_same_weights(state, reference)


@pytest.mark.parametrize("stage", [0, 1, 3])  # at 2 the optimizer sees what it sees at 3
@pytest.mark.parametrize(
    "make",
    [
        lambda p: SignSGD(p, lr=0.01),
        lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5),
        lambda p: torch.optim.NAdam(p, lr=0.01),
        lambda p: torch.optim.Adamax(p, lr=0.01),
        lambda p: torch.optim.Adadelta(p, lr=0.5),
        lambda p: torch.optim.RAdam(p, lr=0.01),
        lambda p: torch.optim.Rprop(p, lr=0.01),
        lambda p: torch.optim.ASGD(p, lr=0.01),
        lambda p: torch.optim.Adam(p, lr=torch.tensor(0.01), amsgrad=True),
        lambda p: torch.optim.AdamW(p, lr=0.01, foreach=False),
        lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    ],
    ids=[
        "SignSGD",
        "RMSprop",
        "NAdam",
        "Adamax",
        "Adadelta",
        "RAdam",
        "Rprop",
        "ASGD",
        "Adam-tensor-lr",
        "AdamW-single",
        "AdamW-fused",
    ],
)
def test_every_elementwise_optimizer_works(comm, stage, make):
    case = CASES["mlp"]
    reference, _ = build(case)
    model, _ = build(case)
    theirs, ours = make(reference.parameters()), make(model.parameters())
    with zerompi.partition(model, ours, stage=stage, comm=comm) as zero:
        train_beside(comm, case, (reference, theirs), (model, ours), 4)
        state = zero.full_state_dict()
    assert_same_weights(state, reference, rtol=1e-3, atol=1e-4)


def test_state_of_an_optimizer_that_has_stepped_before_is_kept(comm):
    case = CASES["mlp"]
    reference, theirs = build(case)
    model, ours = build(case)
    x, y = case.batch(0)
    for net, optimizer in ((reference, theirs), (model, ours)):
        case.loss(net(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    with zerompi.partition(model, ours, comm=comm) as zero:
        x, y = case.batch(1)
        case.loss(reference(x), y).backward()
        theirs.step()
        x, y = own_slice((x, y), comm.rank, comm.size)
        case.loss(model(x), y).backward()
        ours.step()
        state = zero.full_state_dict()
    assert_same_weights(state, reference)


# -- ranks that disagree -----------------------------------------------------------------------


@pytest.mark.mpi(min_size=2)
def test_ranks_with_different_shapes_get_an_error_that_names_both(comm):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 5 if last(comm) else 6))
    with pytest.raises(zerompi.MismatchError) as error:
        zerompi.partition(model, comm=comm)
    rank = comm.size - 1
    assert "rank 0 has parameter 1.weight: torch.float32, shape (6, 4)" in str(error.value)
    assert f"rank {rank} has parameter 1.weight: torch.float32, shape (5, 4)" in str(error.value)


@pytest.mark.mpi(min_size=2)
def test_ranks_with_different_dtypes_get_an_error_that_names_both(comm):
    model = nn.Linear(4, 4, dtype=torch.float64 if last(comm) else torch.float32)
    with pytest.raises(
        zerompi.MismatchError, match=r"weight: torch.float32.*weight: torch.float64"
    ):
        zerompi.partition(model, comm=comm)


@pytest.mark.mpi(min_size=2)
def test_ranks_with_different_order_get_an_error_that_names_both(comm):
    names = ["a", "b"]
    if last(comm):
        names.reverse()
    model = nn.ModuleDict({name: nn.Linear(2, 2) for name in names})
    with pytest.raises(zerompi.MismatchError, match=r"rank 0 has .*a.*; rank \d has .*b"):
        zerompi.partition(model, comm=comm)


@pytest.mark.mpi(min_size=2)
def test_ranks_with_different_models_get_an_error(comm):
    model = nn.Linear(2, 2) if last(comm) else nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with pytest.raises(zerompi.MismatchError, match="rank 0 has"):
        zerompi.partition(model, comm=comm)


@pytest.mark.mpi(min_size=2)
def test_ranks_with_different_stages_get_an_error(comm):
    with pytest.raises(zerompi.MismatchError, match=r"rank 0 has stage 2.*has stage 3"):
        zerompi.partition(nn.Linear(2, 2), stage=3 if last(comm) else 2, comm=comm)


@pytest.mark.mpi(min_size=2)
def test_an_argument_that_is_wrong_on_one_rank_is_refused_on_all(comm):
    stage = 7 if last(comm) else 3
    with pytest.raises((ValueError, zerompi.MismatchError), match="stage: expected") as error:
        zerompi.partition(nn.Linear(2, 2), stage=stage, comm=comm)
    assert isinstance(error.value, ValueError) == last(comm)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_ranks_out_of_step_get_an_error_instead_of_a_hang(comm, stage):
    """One rank clips while the others step, or stops early."""
    case = CASES["gpt"]
    model, optimizer = build(case)
    zero = zerompi.partition(model, optimizer, stage=stage, comm=comm)
    x, y = own_slice(case.batch(0), comm.rank, comm.size)
    with pytest.raises(zerompi.MismatchError, match="ranks disagree on what comes next"):
        if last(comm):
            zero.full_state_dict()
        loss = case.loss(model(x), y)
        loss.backward()
        if last(comm):
            zero.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()
        case.loss(model(x), y).backward()


@pytest.mark.parametrize("stage", [0, 3])
def test_parameters_unfrozen_after_partition_are_refused(comm, stage):
    case = CASES["lora"]
    model, optimizer = build(case)
    zero = zerompi.partition(model, optimizer, stage=stage, comm=comm)
    model.blocks[0].qkv.inner.weight.requires_grad_(True)
    with pytest.raises(zerompi.ZerompiError, match="set requires_grad before zerompi.partition"):
        model(case.batch(0)[0])
    zero.close()


def test_sparse_gradients_are_refused_with_advice(comm):
    model = nn.Embedding(5, 3, sparse=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    zerompi.partition(model, optimizer, comm=comm)
    with pytest.raises(zerompi.ZerompiError, match="sparse=False"):
        model(torch.tensor([1, 2])).sum().backward()
