"""The compiled sum of 16-bit floats has the bits of torch's operations. Needs Numba."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch

from collectives.samples import plain_sum, raw
from kernels.samples import assert_same_bits
from zerompi.kernels.summation_on_host import SumOnHost

DTYPES = [torch.bfloat16, torch.float16]
SCALES = [1.0, 1 / 3, -2.0, 0.0, 2.0**-20, 2.0**20, 3e38, 1e-40, float("inf"), float("nan")]


@cache
def compiled(dtype):
    pytest.importorskip("numba", reason="needs Numba")
    try:
        return SumOnHost(dtype)
    except RuntimeError as error:
        pytest.skip(str(error))


def as_array(values):
    """Values of float16, or of float32 that has those of bfloat16; any NaN equals any other."""
    return (values if values.dtype is torch.float16 else values.float()).numpy()


def assert_sums_as_torch(summands, scale, out=None):
    expected = plain_sum(summands, scale)
    out = torch.empty_like(expected) if out is None else out
    compiled(out.dtype)(summands, out, scale)
    assert_same_bits(as_array(out), as_array(expected))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", SCALES)
def test_every_value_alone_and_with_any_other(dtype, scale):
    every = torch.from_numpy(np.arange(2**16, dtype=np.uint16).view(np.int16)).view(dtype)
    assert_sums_as_torch([every], scale)
    for seed in range(20):
        assert_sums_as_torch([every, raw(dtype, 2**16, seed)], scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("exponent", range(-40, 21, 4))
def test_sums_are_rounded_to_the_nearest_ties_to_even(dtype, exponent):
    generator = torch.Generator().manual_seed(exponent)
    near = [torch.randint(-4096, 4096, (2**16,), generator=generator) for _ in range(3)]
    summands = [(values * 2.0**exponent).to(dtype) for values in near]
    for count in (1, 2, 3):
        for scale in (1.0, 0.5, 0.375):
            assert_sums_as_torch(summands[:count], scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 16])
@pytest.mark.parametrize("numel", [0, 1, 15, 1023, 1024, 1025, 10_000])
def test_any_number_of_summands_of_any_length(dtype, count, numel):
    assert_sums_as_torch([raw(dtype, numel, rank) for rank in range(count)], 1 / count)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("number", range(4))
def test_the_result_may_replace_a_summand(dtype, number):
    summands = [raw(dtype, 5000, rank) for rank in range(4)]
    assert_sums_as_torch(summands, 0.25, out=summands[number])


@pytest.mark.parametrize("dtype", DTYPES)
def test_only_the_result_is_written(dtype):
    memory = raw(dtype, 3000, 0)
    before = memory.clone()
    compiled(dtype)([memory[:999], memory[1001:2000]], memory[2001:], 1.0)
    assert torch.equal(memory[:2001].view(torch.int16), before[:2001].view(torch.int16))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_order_is_that_of_the_summands(dtype):
    large, small = torch.full((8,), 2.0**14, dtype=dtype), torch.full((8,), 2.0**-11, dtype=dtype)
    forward = [large, small, -large]
    assert_sums_as_torch(forward, 1.0)
    assert not torch.equal(plain_sum(forward), plain_sum([large, -large, small]))
    assert_sums_as_torch([large, -large, small], 1.0)
