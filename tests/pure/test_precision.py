"""Mixed precision settings and the loss scale."""

from __future__ import annotations

import pytest
import torch

from zerompi.precision import LossScaler, MixedPrecision


def test_an_overflow_halves_the_scale_and_starts_the_count_anew():
    scaler = LossScaler(8.0, growth_interval=2)
    scaler.update(overflow=False)
    scaler.update(overflow=True)
    assert (scaler.scale, scaler.steps_since_overflow) == (4.0, 0)
    scaler.update(overflow=False)
    assert scaler.scale == 4.0


def test_the_scale_doubles_after_each_growth_interval():
    scaler = LossScaler(8.0, growth_interval=3)
    for _ in range(6):
        scaler.update(overflow=False)
    assert scaler.scale == 32.0


def test_the_scale_stays_within_its_bounds():
    low, high = LossScaler(2.0**-24), LossScaler(2.0**24, growth_interval=1)
    low.update(overflow=True)
    high.update(overflow=False)
    assert (low.scale, high.scale) == (2.0**-24, 2.0**24)


def test_a_fixed_scale_never_moves():
    scaler = LossScaler(128.0, dynamic=False, growth_interval=1)
    scaler.update(overflow=True)
    scaler.update(overflow=False)
    assert scaler.scale == 128.0


def test_the_state_goes_through_a_checkpoint():
    scaler = LossScaler(growth_interval=3)
    for overflow in (True, False, False):
        scaler.update(overflow=overflow)
    other = LossScaler(growth_interval=3)
    other.load_state_dict(scaler.state_dict())
    other.update(overflow=False)
    assert other.scale == 2.0**16


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (MixedPrecision(), None),
        (MixedPrecision(torch.bfloat16), None),
        (MixedPrecision(torch.float16), (2.0**16, True)),
        (MixedPrecision(torch.bfloat16, loss_scale="dynamic"), (2.0**16, True)),
        (MixedPrecision(torch.float16, loss_scale=64), (64.0, False)),
        (MixedPrecision(loss_scale=1.0), (1.0, False)),
    ],
)
def test_the_scaler_follows_the_settings(settings, expected):
    scaler = settings.make_scaler()
    assert (None if scaler is None else (scaler.scale, scaler.dynamic)) == expected


@pytest.mark.parametrize("field", ["param_dtype", "reduce_dtype", "output_dtype"])
@pytest.mark.parametrize("value", ["float16", torch.int32, torch.complex64, torch.bool])
def test_dtypes_that_are_not_floating_point_are_refused(field, value):
    with pytest.raises(TypeError, match=f"{field}: expected a floating-point torch.dtype"):
        MixedPrecision(**{field: value})


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), "static"])
def test_scales_that_cannot_work_are_refused(value):
    with pytest.raises(ValueError, match="loss_scale: expected"):
        MixedPrecision(loss_scale=value)
