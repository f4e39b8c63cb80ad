"""The norm of gradients in device memory, and their check: one wait for all, the same answers."""

from __future__ import annotations

import pytest
import torch

import zerompi
from harness.memory import HAS_DEVICE, WITHOUT_DEVICE
from models import CASES, build, own_slice
from test_device_memory import build_on_device
from zerompi import device, gradient_norms, gradients
from zerompi.gradients import named

pytestmark = [pytest.mark.placed, pytest.mark.skipif(not HAS_DEVICE, reason=WITHOUT_DEVICE)]


def backward(comm, case, model):
    x, y = own_slice(case.batch(0), comm.rank, comm.size)
    case.loss(model(x), y).backward()


@pytest.mark.cover
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("norm_type", [1.0, 2.0, torch.inf])
@pytest.mark.parametrize("reduce_dtype", [None, torch.bfloat16])
def test_norms_are_those_of_the_host(comm, stage, norm_type, reduce_dtype):
    case, norms = CASES["gpt"], []
    precision = zerompi.MixedPrecision(reduce_dtype, reduce_dtype)
    for make in (build, build_on_device):
        model, opt = make(case)
        with zerompi.partition(
            model, opt, stage=stage, comm=comm, mixed_precision=precision
        ) as zero:
            backward(comm, case, model)
            norms.append(zero.clip_grad_norm_(torch.inf, norm_type).item())
    assert norms[1] == pytest.approx(norms[0], rel=1e-6)


@pytest.mark.cover
@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize("reduce_dtype", [None, torch.bfloat16])
def test_the_host_waits_once_and_launches_once_for_each_segment(
    comm, stage, reduce_dtype, monkeypatch
):
    launched, looked = [], []
    sums_of_squares, find_markers = gradient_norms.sums_of_squares, gradients._find_markers

    def look(pieces):
        looked.append(len(pieces))
        return find_markers(pieces)

    def counted(tensors):
        launched.append(len(tensors))
        return sums_of_squares(tensors)

    monkeypatch.setattr(gradient_norms, "sums_of_squares", counted)
    monkeypatch.setattr(gradient_norms, "is_finite", _fail)
    monkeypatch.setattr(gradients, "_find_markers", look)
    model, opt = build_on_device(CASES["gpt"])
    mixed = zerompi.MixedPrecision(reduce_dtype, reduce_dtype)
    with zerompi.partition(model, opt, stage=stage, comm=comm, mixed_precision=mixed) as zero:
        backward(comm, CASES["gpt"], model)
        zero.clip_grad_norm_(1.0)
        opt.step()
        segments = sum(len(unit.trainable) for unit in zero._units)
        pieces = sum(len(s.pieces) for unit in zero._units for s in unit.trainable)
    assert len(launched) == 2
    assert max(launched) <= segments
    assert looked == [pieces if reduce_dtype else 0] * 3  # the norm, the check, the step


def _fail(gradient):
    raise AssertionError("looked at piece by piece")


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_a_gradient_that_is_not_finite_is_named(comm, stage, bad):
    model, opt = build_on_device(CASES["mlp"])
    with zerompi.partition(model, opt, stage=stage, comm=comm) as zero:
        backward(comm, CASES["mlp"], model)
        for unit in zero._units:
            for segment in unit.segments:
                for name, gradient in named([segment]):
                    if name == "layers.0.bias" and gradient.numel():
                        gradient.view(-1)[0] = bad
        with pytest.raises(zerompi.NonFiniteError, match=r"the gradient of layers\.0\.bias is not"):
            opt.step()


def test_gradients_in_another_dtype_are_looked_at_by_torch():
    tensors = [torch.ones(3, dtype=torch.float64)]
    assert gradient_norms.squares_on_device(tensors) is None
    assert gradient_norms.squares_on_device([torch.ones(3)]) is None
    assert gradient_norms.squares_on_device([torch.ones(0)]) == []


def test_what_only_happens_to_be_adjacent_is_notjoined(comm):
    memory = device.allocate(8, torch.float32, build_space())
    whole = gradient_norms.joined([memory[:3], memory[3:8]])
    assert [part.numel() for part in whole] == [8]
    with_gap = gradient_norms.joined([memory[:3], memory[4:8]])
    assert [part.numel() for part in with_gap] == [3, 4]
    first, second = (memory[a:b].detach() for a, b in ((0, 3), (3, 8)))
    other = torch.frombuffer((second.numpy()), dtype=torch.float32)  # a storage of its own
    assert [part.numel() for part in gradient_norms.joined([first, other])] == [3, 5]


def build_space():
    """The space of a model on a device."""
    model, _ = build_on_device(CASES["mlp"])
    return device.space_of(next(model.parameters()))
