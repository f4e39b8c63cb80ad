"""Gradients that are NaN or infinite: named, and raised, skipped or ignored alike on all ranks."""

from __future__ import annotations

import pytest
import torch

import zerompi
from models import CASES, MLP, build, own_slice

STAGES = [0, 1, 2, 3]
FAULTS = {"nan": float("nan"), "inf": float("inf")}


@pytest.fixture(params=STAGES)
def stage(request) -> int:
    return request.param


def poison(model, comm, value, name="layers.2.bias"):
    """From now on the gradient of one element of one parameter is `value` on the last rank."""

    def spoil(gradient):
        gradient = gradient.clone()
        gradient.view(-1)[-1] = value
        return gradient

    if comm.rank == comm.size - 1:
        return dict(model.named_parameters())[name].register_hook(spoil)
    return None


def backward(comm, model, step=0):
    case = CASES["mlp"]
    x, y = own_slice(case.batch(step), comm.rank, comm.size)
    case.loss(model(x), y).backward()


def state_of(zero, optimizer):
    """Copies of everything that a step changes."""
    states = [
        {key: value.clone() for key, value in optimizer.state[piece].items()}
        for group in optimizer.param_groups
        for piece in group["params"]
    ]
    return zero.full_state_dict(), states


def assert_same(first, second):
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.cover
@pytest.mark.parametrize("clips", [False, True])
@pytest.mark.parametrize("fault", ["nan", "inf"])
def test_a_fault_is_raised_on_all_ranks_with_its_name_and_changes_nothing(
    comm, stage, fault, clips
):
    model, optimizer = build(CASES["mlp"])
    with zerompi.partition(model, optimizer, stage=stage, comm=comm) as zero:
        backward(comm, model)
        optimizer.step()
        optimizer.zero_grad()
        before = state_of(zero, optimizer)
        handle = poison(model, comm, FAULTS[fault])
        backward(comm, model)
        if clips:
            assert not zero.clip_grad_norm_(1.0).isfinite()
        with pytest.raises(
            zerompi.NonFiniteError, match=r"the gradient of layers\.2\.bias is not finite; the step"
        ):
            optimizer.step()
        assert_same(state_of(zero, optimizer), before)
        if handle is not None:
            handle.remove()
        optimizer.zero_grad()
        backward(comm, model)
        optimizer.step()  # and training goes on


def test_a_gradient_whose_square_overflows_is_clipped(comm, stage):
    model, optimizer = build(CASES["mlp"])
    with zerompi.partition(model, optimizer, stage=stage, comm=comm) as zero:
        poison(model, comm, 1e25)
        backward(comm, model)
        assert 1e20 < zero.clip_grad_norm_(1.0) < torch.inf
        assert float(zero.clip_grad_norm_(torch.inf)) == pytest.approx(1.0, rel=1e-4)


def test_a_fault_is_skipped_on_all_ranks_and_said_once(comm, stage, caplog):
    model, optimizer = build(CASES["mlp"])
    reference, theirs = build(CASES["mlp"])
    with (
        zerompi.partition(model, optimizer, stage=stage, comm=comm, nonfinite="skip") as zero,
        zerompi.partition(reference, theirs, stage=stage, comm=comm) as expected,
    ):
        for step in range(4):
            handle = poison(model, comm, float("nan")) if step == 2 else None
            backward(comm, model, step)
            zero.clip_grad_norm_(1.0)
            optimizer.step()
            optimizer.zero_grad()
            if handle is not None:
                handle.remove()
            if step != 2:
                backward(comm, reference, step)
                expected.clip_grad_norm_(1.0)
                theirs.step()
                theirs.zero_grad()
        assert_same(state_of(zero, optimizer), state_of(expected, theirs))
        assert (zero.skipped_steps, expected.skipped_steps) == (1, 0)
    said = [record.getMessage() for record in caplog.records if record.name == "zerompi"]
    text = "the gradient of layers.2.bias is not finite; the optimizer step is skipped"
    assert said == ([text] if comm.rank == 0 else [])


def test_a_fault_that_is_ignored_goes_where_torch_lets_it_go(comm, stage):
    model, optimizer = build(CASES["mlp"], "sgd")
    with zerompi.partition(model, optimizer, stage=stage, comm=comm, nonfinite="ignore") as zero:
        poison(model, comm, float("nan"))
        backward(comm, model)
        optimizer.step()
        spoiled = {name for name, value in zero.full_state_dict().items() if value.isnan().any()}
        assert spoiled == {"layers.2.bias"}
        assert zero.skipped_steps == 0


def test_a_loss_that_is_nan_is_said_to_be_perhaps_the_cause(comm, stage):
    case = CASES["gpt"]
    model, optimizer = build(case)
    with zerompi.partition(model, optimizer, stage=stage, comm=comm):
        x, y = own_slice(case.batch(0), comm.rank, comm.size)
        loss = case.loss(model(x), y)
        (loss * float("nan") if comm.rank == 0 else loss).backward()
        with pytest.raises(zerompi.NonFiniteError, match=r"and \d+ more are not finite.*the loss"):
            optimizer.step()


def test_large_but_finite_gradients_are_no_fault(comm, stage):
    """Their sum overflows; they do not."""
    model, optimizer = build(CASES["mlp"], "sgd")
    with zerompi.partition(model, optimizer, stage=stage, comm=comm):
        for name in ("layers.0.weight", "layers.2.weight"):
            dict(model.named_parameters())[name].register_hook(
                lambda gradient: torch.full_like(gradient, 1e38 / comm.size)
            )
        backward(comm, model)
        optimizer.step()


@pytest.mark.parametrize("reduce_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_faults_are_found_in_every_reduce_dtype(comm, stage, reduce_dtype):
    model, optimizer = build(CASES["mlp"])
    precision = zerompi.MixedPrecision(torch.bfloat16, reduce_dtype, torch.float32)
    with zerompi.partition(model, optimizer, stage=stage, comm=comm, mixed_precision=precision):
        backward(comm, model)
        optimizer.step()
        optimizer.zero_grad()
        poison(model, comm, float("inf"))
        backward(comm, model)
        with pytest.raises(zerompi.NonFiniteError, match=r"layers\.2\.bias"):
            optimizer.step()


@pytest.mark.parametrize("scale", [None, 64.0])
def test_with_a_loss_scale_faults_that_it_does_not_explain_are_raised(comm, stage, scale):
    """A dynamic scale falls to 1 first, and skips these steps; a fixed one explains nothing."""
    model, optimizer = build(CASES["mlp"])
    precision = zerompi.MixedPrecision(torch.float16, loss_scale=scale, output_dtype=torch.float32)
    with zerompi.partition(
        model, optimizer, stage=stage, comm=comm, mixed_precision=precision
    ) as zero:
        poison(model, comm, float("nan"))
        skipped = 16 if scale is None else 0  # 2**16 to 1
        for _ in range(skipped):
            backward(comm, model)
            optimizer.step()
            optimizer.zero_grad()
        backward(comm, model)
        with pytest.raises(zerompi.NonFiniteError, match=r"layers\.2\.bias"):
            optimizer.step()
        assert zero.skipped_steps == skipped


def test_finding_faults_sends_nothing(comm, stage):
    sent = []
    for policy in ("ignore", "raise"):
        model, optimizer = build(CASES["mlp"])
        with zerompi.partition(
            model, optimizer, stage=stage, comm=comm, nonfinite=policy,
            topology=zerompi.Topology(comm, ranks_per_node=1),
        ) as zero:  # fmt: skip
            for _ in range(2):
                backward(comm, model)
                optimizer.step()
                optimizer.zero_grad()
            sent.append(zero.report().traffic)
    assert sent[0] == sent[1]


@pytest.mark.mpi(min_size=2)
def test_ranks_that_have_ended_skip_and_raise_too(comm, stage):
    model, optimizer = build(CASES["mlp"])
    zero = zerompi.partition(model, optimizer, stage=stage, comm=comm)
    with (
        pytest.raises(zerompi.NonFiniteError, match=r"layers\.2\.bias"),
        zero.join(),
    ):
        if comm.rank == comm.size - 1:
            for _ in range(2):
                backward(comm, model)
                optimizer.step()
                optimizer.zero_grad()
                poison(model, comm, float("nan"))


def test_wrong_policies_are_refused(comm):
    with pytest.raises(ValueError, match="nonfinite: expected 'raise', 'skip' or 'ignore', got 1"):
        zerompi.partition(MLP(), comm=comm, nonfinite=1)


@pytest.mark.mpi(min_size=2)
def test_policies_that_differ_between_ranks_are_refused(comm):
    with pytest.raises(zerompi.MismatchError, match="nonfinite raise.*nonfinite skip"):
        zerompi.partition(MLP(), comm=comm, nonfinite="skip" if comm.rank else "raise")
