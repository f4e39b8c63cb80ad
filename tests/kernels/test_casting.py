"""Between float32 and narrow dtypes on the host, against torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kernels.samples import DTYPES, LARGEST, assert_same_bits, random_blocks
from zerompi.kernels import casting

TORCH = {"float16": torch.float16, "bfloat16": torch.bfloat16}
NARROW = list(TORCH)


def every_value(dtype):
    return np.arange(2**16, dtype=np.uint16).view(DTYPES[dtype])


def tensor(values, dtype):
    return torch.from_numpy(values.view(np.int16)).view(TORCH[dtype])


def cast(values, dtype):
    out = np.empty(values.shape, dtype)
    casting.cast(values, out)
    return out


@pytest.mark.parametrize("dtype", NARROW)
def test_every_narrow_value_is_widened_as_in_torch(dtype):
    values = every_value(dtype)
    assert_same_bits(cast(values, np.float32), tensor(values, dtype).float().numpy())


@pytest.mark.parametrize("dtype", NARROW)
def test_every_narrow_value_comes_back(dtype):
    values = every_value(dtype)
    wide = cast(values, np.float32)
    back = cast(wide, DTYPES[dtype])
    is_number = ~np.isnan(wide)
    assert_same_bits(back[is_number], values[is_number])
    assert np.isnan(cast(back[~is_number], np.float32)).all()


@pytest.mark.parametrize("dtype", NARROW)
def test_rounding_is_that_of_torch(dtype):
    every = cast(every_value(dtype), np.float32)
    numbers = np.sort(every[np.isfinite(every)])
    halfway = (numbers[:-1].astype(np.float64) + numbers[1:]) / 2
    values = np.concatenate(
        [
            random_blocks(2000, 32, seed=2),
            halfway.astype(np.float32),
            np.nextafter(halfway.astype(np.float32), np.float32(0)),
            np.array([LARGEST, -LARGEST, 65519, 65520, np.inf, -np.inf], np.float32),
        ]
    )
    values = values[~np.isnan(values)]
    expected = torch.from_numpy(values).to(TORCH[dtype]).view(torch.int16).numpy()
    assert_same_bits(cast(values, DTYPES[dtype]).view(np.int16), expected)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("bits", [0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF, 0xFF800001])
def test_a_nan_stays_one(dtype, bits):
    values = np.array([1, bits, 2], np.uint32).view(np.float32)
    assert np.isnan(cast(cast(values, DTYPES[dtype]), np.float32)).tolist() == [False, True, False]


def test_dtypes_that_are_not_cast_are_refused():
    ones = np.ones(4, np.float32)
    with pytest.raises(TypeError, match="out: expected float32 and a narrow dtype"):
        casting.cast(ones, ones.copy())
    with pytest.raises(TypeError, match="values: expected float32, float16 or uint16, got int32"):
        casting.cast(ones.astype(np.int32), ones)
    with pytest.raises(ValueError, match=r"out: expected shape \(4,\), got \(3,\)"):
        casting.cast(ones, np.ones(3, np.float16))
