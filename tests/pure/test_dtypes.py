"""The dtype of the accumulator."""

from __future__ import annotations

import pytest
import torch

from zerompi.dtypes import accumulate_dtype


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2]
)
def test_narrow_floating_point_accumulates_in_float32(dtype):
    assert accumulate_dtype(dtype) is torch.float32


def test_complex32_accumulates_in_complex64():
    assert accumulate_dtype(torch.complex32) is torch.complex64


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float64, torch.complex64, torch.complex128, torch.int8, torch.bool],
)
def test_other_dtypes_accumulate_in_themselves(dtype):
    assert accumulate_dtype(dtype) is dtype


@pytest.mark.parametrize("dtype", [torch.quint8, torch.bits8, torch.qint32])
def test_dtypes_without_a_sum_are_refused(dtype):
    with pytest.raises(TypeError, match="dtype: expected one that can be summed"):
        accumulate_dtype(dtype)


@pytest.mark.filterwarnings("ignore:.*quantized tensor:UserWarning")
def test_every_dtype_that_is_accepted_can_be_added():
    for dtype in {d for d in vars(torch).values() if isinstance(d, torch.dtype)}:
        try:
            accumulator = accumulate_dtype(dtype)
        except TypeError:
            continue
        values = torch.zeros(16, dtype=torch.uint8).view(dtype)
        assert values.to(accumulator).to(dtype).dtype is dtype
