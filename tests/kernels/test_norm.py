"""The sum of squares on the host: value, order, what is not finite."""

from __future__ import annotations

import math

import numpy as np
import pytest

from kernels.samples import DTYPES, LARGEST, as_dtype, as_float32
from zerompi.kernels.norm import sum_of_squares

TILE = 32 * 256
SIZES = [0, 1, 255, 256, 257, TILE - 1, TILE, TILE + 1, 5 * TILE + 3]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", SIZES)
def test_it_is_the_sum_of_squares(n, dtype):
    values = as_dtype(np.random.default_rng(n).standard_normal(n).astype(np.float32), dtype)
    exact = math.fsum(x * x for x in as_float32(values).tolist())
    assert sum_of_squares(values) == pytest.approx(exact, rel=1e-14, abs=0)


def test_the_order_is_the_documented_one():
    values = np.random.default_rng(0).standard_normal(2 * TILE + 700).astype(np.float32)
    padded = np.zeros(3 * TILE)
    padded[: values.size] = values.astype(np.float64) ** 2

    def tile(numbers):
        sums = [0.0] * 256
        for i, number in enumerate(numbers):
            sums[i % 256] += number
        while len(sums) > 1:
            half = len(sums) // 2
            sums = [a + b for a, b in zip(sums[:half], sums[half:], strict=True)]
        return sums[0]

    expected = tile([tile(part) for part in padded.reshape(3, TILE).tolist()])
    assert sum_of_squares(values) == expected


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("place", [0, TILE, 2 * TILE + 4])
def test_it_is_not_finite_if_a_value_is_not(dtype, bad, place):
    values = np.ones(2 * TILE + 5, np.float32)
    values[place] = bad
    assert not math.isfinite(sum_of_squares(as_dtype(values, dtype)))


def test_the_largest_and_the_smallest_values_give_no_overflow_and_no_zero():
    assert sum_of_squares(np.full(1000, LARGEST)) == pytest.approx(1000 * float(LARGEST) ** 2)
    assert sum_of_squares(np.full(4, 2.0**-149, np.float32)) == 4 * 2.0**-298
