"""Mixed precision: dtypes at every step of the way, and the loss scale."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import zerompi
from models import CASES, build, own_slice

STAGES = [0, 1, 2, 3]


def reference_step(model, case, batch, dtype, reduce_dtype, size, optimizer, main):
    """One step of mixed precision by hand: `size` ranks' gradients in `dtype`, summed in float32."""
    with torch.no_grad():
        for parameter, weight in zip(model.parameters(), main, strict=True):
            parameter.copy_(weight)
    sums = [torch.zeros_like(weight) for weight in main]
    losses = []
    for rank in range(size):
        x, y = own_slice(batch, rank, size)
        x = x.to(dtype) if x.is_floating_point() else x
        loss = case.loss(model(x), y)
        loss.backward()
        losses.append(loss.item())
        for total, parameter in zip(sums, model.parameters(), strict=True):
            total += parameter.grad.to(reduce_dtype).float()
            parameter.grad = None
    for weight, total in zip(main, sums, strict=True):
        weight.grad = (total / size).to(reduce_dtype).float()
    optimizer.step()
    optimizer.zero_grad()
    return sum(losses) / size


def close(value, expected):
    """Within what the order of a float32 sum can do to a rounding."""
    torch.testing.assert_close(value, expected, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("reduce_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stage", STAGES)
def test_bfloat16_with_float32_main_weights_equals_the_same_by_hand(comm, stage, reduce_dtype):
    case = CASES["gpt"]
    reference, _ = build(case)
    main = [nn.Parameter(p.detach().clone()) for p in reference.parameters()]
    names = [name for name, _ in reference.named_parameters()]
    reference_optimizer = torch.optim.SGD(main, lr=0.05, momentum=0.9)
    reference.to(torch.bfloat16)
    model, optimizer = build(case, "sgd")
    precision = zerompi.MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=reduce_dtype)
    with zerompi.partition(
        model, optimizer, stage=stage, comm=comm, mixed_precision=precision
    ) as zero:
        for step in range(6):
            batch = case.batch(step)
            expected = reference_step(
                reference, case, batch, torch.bfloat16, reduce_dtype, comm.size,
                reference_optimizer, main,
            )  # fmt: skip
            x, y = own_slice(batch, comm.rank, comm.size)
            logits = model(x)
            assert logits.dtype is torch.bfloat16
            loss = case.loss(logits, y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            assert comm.allreduce(loss.item()) / comm.size == pytest.approx(expected, rel=2e-3)
        state = zero.full_state_dict()
        for name, weight in zip(names, main, strict=True):
            assert state[name].dtype is torch.float32
            close(state[name], weight.detach())


@pytest.mark.parametrize("stage", STAGES)
def test_dtypes_of_parameters_gradients_and_outputs(comm, stage):
    case = CASES["mlp"]
    model, optimizer = build(case)
    seen = []
    model.register_forward_hook(
        lambda module, args, output: seen.extend([args[0].dtype, next(model.parameters()).dtype])
    )
    precision = zerompi.MixedPrecision(torch.bfloat16, torch.bfloat16, torch.float32)
    with zerompi.partition(model, optimizer, stage=stage, comm=comm, mixed_precision=precision):
        x, y = own_slice(case.batch(0), comm.rank, comm.size)
        output = model(x)
        assert seen == [torch.bfloat16, torch.bfloat16]
        assert output.dtype is torch.float32
        case.loss(output, y).backward()
        optimizer.step()
        for group in optimizer.param_groups:
            for piece in group["params"]:
                assert piece.dtype is torch.float32
                for value in optimizer.state[piece].values():
                    assert value.dtype is torch.float32


@pytest.mark.parametrize("stage", STAGES)
def test_float16_halves_the_loss_scale_and_skips_the_step_at_an_overflow(comm, stage):
    case = CASES["mlp"]
    model, optimizer = build(case)
    precision = zerompi.MixedPrecision(torch.float16)
    with zerompi.partition(
        model, optimizer, stage=stage, comm=comm, mixed_precision=precision
    ) as zero:
        assert zero.loss_scale == 2.0**16
        before = zero.full_state_dict()
        x, y = own_slice(case.batch(0), comm.rank, comm.size)
        loss = case.loss(model(x), y.half())
        if comm.rank == comm.size - 1:
            loss = loss * 1e4  # one rank alone overflows
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert zero.loss_scale == 2.0**15
        assert not any(optimizer.state.values())
        after = zero.full_state_dict()
        assert all(torch.equal(after[key], before[key]) for key in before)


@pytest.mark.parametrize("stage", STAGES)
def test_float16_trains_as_the_loss_scale_settles(comm, stage):
    case = CASES["gpt"]
    model, optimizer = build(case)
    reference, reference_optimizer = build(case)
    precision = zerompi.MixedPrecision(torch.float16)
    with zerompi.partition(
        model, optimizer, stage=stage, comm=comm, mixed_precision=precision
    ) as zero:
        taken = 0
        step = 0
        while taken < 6:
            x, y = own_slice(case.batch(step % 12), comm.rank, comm.size)
            scale = zero.loss_scale
            loss = case.loss(model(x), y)
            loss.backward()
            zero.clip_grad_norm_(1.0)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            if zero.loss_scale < scale:
                continue
            taken += 1
            x, y = case.batch((step - 1) % 12)
            expected = case.loss(reference(x), y)
            expected.backward()
            torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
            reference_optimizer.step()
            reference_optimizer.zero_grad()
            mean = comm.allreduce(loss.item()) / comm.size
            assert mean == pytest.approx(expected.item(), rel=5e-3)


@pytest.mark.parametrize("stage", STAGES)
def test_a_fixed_loss_scale_does_not_change_float32_training(comm, stage):
    case = CASES["gpt"]
    states = []
    for precision in (None, zerompi.MixedPrecision(loss_scale=1024.0)):
        model, optimizer = build(case)
        with zerompi.partition(
            model, optimizer, stage=stage, comm=comm, mixed_precision=precision
        ) as zero:
            for step in range(3):
                x, y = own_slice(case.batch(step), comm.rank, comm.size)
                case.loss(model(x), y).backward()
                zero.clip_grad_norm_(0.5)
                optimizer.step()
                optimizer.zero_grad()
            states.append(zero.full_state_dict())
    for key, value in states[0].items():
        torch.testing.assert_close(states[1][key], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stage", STAGES)
def test_accumulation_and_clipping_in_bfloat16(comm, stage):
    """no_sync, clip_grad_norm_ and zero_grad with gradients that wait in the reduce dtype."""
    case = CASES["mlp"]
    model, optimizer = build(case, "sgd")
    precision = zerompi.MixedPrecision(torch.bfloat16, torch.bfloat16)
    with zerompi.partition(
        model, optimizer, stage=stage, comm=comm, mixed_precision=precision
    ) as zero:
        x, y = own_slice(case.batch(0), comm.rank, comm.size)
        y = y.bfloat16()
        case.loss(model(x), y).backward()
        norm = zero.clip_grad_norm_(float("inf"))
        optimizer.zero_grad()
        with zero.no_sync():
            case.loss(model(x), y).backward()
        case.loss(model(x), y).backward()
        double = zero.clip_grad_norm_(1e-2)
        assert double.item() == pytest.approx(2 * norm.item(), rel=1e-2)
        before = zero.full_state_dict()
        optimizer.step()
        optimizer.zero_grad()
        after = zero.full_state_dict()
        moved = sum((after[key] - before[key]).square().sum() for key in before).sqrt()
        assert moved.item() == pytest.approx(0.05 * 1e-2, rel=0.05)


def test_wrong_settings_are_refused():
    with pytest.raises(TypeError, match="param_dtype: expected a floating-point torch.dtype"):
        zerompi.MixedPrecision(torch.int8)
    with pytest.raises(ValueError, match="loss_scale: expected 'dynamic' or a number"):
        zerompi.MixedPrecision(loss_scale="static")
    with pytest.raises(ValueError, match="loss_scale: expected a positive number"):
        zerompi.MixedPrecision(loss_scale=0)
