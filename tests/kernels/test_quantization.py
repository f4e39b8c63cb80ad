"""Block quantization on the host: the format, and its error bound."""

from __future__ import annotations

import numpy as np
import pytest

from kernels.samples import (
    LARGEST,
    SMALLEST,
    as_dtype,
    as_float32,
    assert_same_bits,
    random_blocks,
)
from zerompi.kernels import quantization
from zerompi.kernels.quantization import packed_nbytes, packed_numel

BITS = [8, 4]
LARGEST_CODE = {8: 127, 4: 7}


def quantized(values, bits, block):
    packed = np.full(packed_nbytes(values.size, bits, block), 0xAA, np.uint8)
    quantization.quantize(values, packed, bits, block)
    return packed


def dequantized(packed, n, bits, block):
    out = np.full(n, np.nan, np.float32)
    quantization.dequantize(packed, out, bits, block)
    return out


def round_trip(values, bits, block):
    return dequantized(quantized(values, bits, block), values.size, bits, block)


def blocks_of(values, block):
    return [values[i : i + block] for i in range(0, values.size, block)]


def assert_within_bound(values, bits, block):
    code = LARGEST_CODE[bits]
    results = round_trip(values, bits, block)
    for part, result in zip(blocks_of(values, block), blocks_of(results, block), strict=True):
        if np.isfinite(part).all():
            exact = part.astype(np.float64)
            bound = np.abs(exact).max() / (2 * code) * (1 + (2 * code + 2) * 2.0**-23) + 2.0**-149
            assert np.abs(exact - result).max() <= bound
        else:
            assert np.isnan(result).all()


# -- the format --------------------------------------------------------------------------------


def test_eight_bits_are_scales_then_bytes():
    values = np.array([127, -127, 0.5, 1.5, 254, -3], np.float32)
    packed = quantized(values, 8, 4)
    assert_same_bits(packed[:8].view(np.float32), np.array([1, 2], np.float32))
    # Ties go to the even neighbour.
    assert packed[8:].view(np.int8).tolist() == [127, -127, 0, 2, 127, -2]


def test_four_bits_share_a_byte_the_earlier_in_its_low_half():
    packed = quantized(np.array([7, -7, 1, -1, 14], np.float32), 4, 4)
    assert_same_bits(packed[:8].view(np.float32), np.array([1, 2], np.float32))
    assert packed[8:].tolist() == [0x97, 0xF1, 0x07]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("n", [1, 2, 97, 98, 20_001])
def test_codes_are_those_of_the_definition(bits, n):
    block = 32
    values = np.random.default_rng(n).standard_normal(n).astype(np.float32)
    packed = quantized(values, bits, block)
    count = len(blocks_of(values, block))
    codes = packed[4 * count :]
    if bits == 4:
        halves = np.stack([codes & 15, codes >> 4], axis=1).reshape(-1).astype(np.int8)
        assert not halves[n:].any()
        codes = np.where(halves > 7, halves - 16, halves)[:n]
    codes = codes.view(np.int8)
    scales = packed[: 4 * count].view(np.float32)
    for part, scale, numbers in zip(
        blocks_of(values, block), scales, blocks_of(codes, block), strict=True
    ):
        exact = np.abs(part).max().astype(np.float64) / LARGEST_CODE[bits]
        assert abs(scale / exact - 1) <= 2.0**-23
        assert_same_bits(numbers, np.rint(part / scale).astype(np.int8))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("block", [2, 6, 256])
def test_size_and_number_of_values_belong_to_each_other(bits, block):
    for n in range(600):
        nbytes = packed_nbytes(n, bits, block)
        assert nbytes == 4 * -(-n // block) + -(-n * bits // 8)
        assert packed_numel(nbytes, bits, block) == n + (n % 2 if bits == 4 else 0)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("bits", BITS)
def test_narrow_values_are_widened_before_and_rounded_after(dtype, bits):
    values = as_dtype(random_blocks(2000, 32, seed=1)[:-5], dtype)
    packed = quantized(values, bits, 32)
    assert_same_bits(packed, quantized(as_float32(values), bits, 32))
    out = np.empty_like(values)
    quantization.dequantize(packed, out, bits, 32)
    expected = as_dtype(dequantized(packed, values.size, bits, 32), dtype)
    assert_same_bits(out, expected)


# -- the bound ---------------------------------------------------------------------------------

HARD = {
    "all equal": np.full(64, 0.1),
    "one outlier": np.r_[np.full(63, 1e-3), 1e6],
    "zeros": np.zeros(64),
    "negative zeros": -np.zeros(64),
    "one subnormal": np.r_[np.zeros(63), SMALLEST],
    "subnormals": SMALLEST * np.arange(-32, 32),
    "subnormal scale": SMALLEST * np.r_[np.arange(63), 190],
    "just above a normal scale": 2.0**-126 * np.linspace(-127.5, 127.5, 64),
    "largest": np.full(64, LARGEST),
    "largest and smallest": np.r_[LARGEST, -LARGEST, SMALLEST, np.zeros(61)],
    "halves": np.r_[127, np.arange(63) + 0.5],
}


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", HARD)
def test_the_bound_holds_for_hard_blocks(name, bits):
    assert_within_bound(HARD[name].astype(np.float32), bits, 64)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("block", [2, 62])
def test_the_bound_holds_for_random_blocks(bits, block):
    with np.errstate(over="ignore", invalid="ignore"):
        assert_within_bound(random_blocks(2000, block, seed=block)[:-1], bits, block)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("peak", [LARGEST, np.nextafter(LARGEST, np.float32(0)), LARGEST / 2])
def test_the_largest_numbers_stay_finite(bits, peak):
    result = round_trip(np.array([peak, -peak], np.float32), bits, 2)
    assert np.isfinite(result).all()
    assert result[0] == pytest.approx(peak, rel=2.0**-23)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_a_block_that_is_not_finite_becomes_nan_and_no_other(bits, bad):
    values = np.ones(12, np.float32)
    values[5] = bad
    packed = quantized(values, bits, 4)
    assert (
        np.isnan(dequantized(packed, 12, bits, 4)).tolist()
        == [False] * 4 + [True] * 4 + [False] * 4
    )
    codes = packed[12:][bits // 2 : bits]
    assert not codes.any()


# -- sums --------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("scale", [1.0, 1 / 3])
def test_a_sum_is_added_in_order_in_float32_and_scaled_last(bits, scale):
    n, block = 40_001, 32  # more than is worked on at a time
    packed = [quantized(random_blocks(1300, block, seed)[:n], bits, block) for seed in range(3)]
    out = np.empty(n, np.float32)
    quantization.dequantize_sum(packed, out, bits, block, scale)
    first, second, third = (dequantized(p, n, bits, block) for p in packed)
    with np.errstate(over="ignore", invalid="ignore"):
        assert_same_bits(out, (first + second + third) * np.float32(scale))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("n", [0, 1, 33, 64, 40_001])
def test_quantizing_a_sum_gives_the_bits_of_the_two_steps(bits, n):
    block = 32
    packed = [quantized(random_blocks(1300, block, seed)[:n], bits, block) for seed in range(4)]
    out = np.full_like(packed[0], 0xAA)
    quantization.dequantize_sum_quantize(packed, out, bits, block, 0.25)
    total = np.empty(n, np.float32)
    quantization.dequantize_sum(packed, total, bits, block, 0.25)
    assert_same_bits(out, quantized(total, bits, block))


@pytest.mark.parametrize("bits", BITS)
def test_packed_arrays_may_begin_anywhere(bits):
    values = random_blocks(10, 32, seed=0)
    packed = quantized(values, bits, 32)
    shifted = np.empty(packed.size + 1, np.uint8)[1:]
    quantization.quantize(values, shifted, bits, 32)
    assert_same_bits(shifted, packed)
    assert_same_bits(dequantized(shifted, 320, bits, 32), dequantized(packed, 320, bits, 32))


# -- errors ------------------------------------------------------------------------------------

ONES = np.ones(8, np.float32)
PACKED = np.zeros(16, np.uint8)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((ONES, PACKED, 5, 4), ValueError, "bits: expected 8 or 4, got 5"),
        ((ONES, PACKED, 8, 3), ValueError, "block: expected a positive even number, got 3"),
        ((ONES, PACKED, 8, 0), ValueError, "block: expected a positive even number, got 0"),
        ((ONES, PACKED[1:], 8, 4), ValueError, "packed: expected 16 contiguous bytes"),
        ((ONES, PACKED.view(np.int8), 8, 4), TypeError, "packed: expected uint8, got int8"),
        ((ONES.astype(np.float64), PACKED, 8, 4), TypeError, "values: expected float32, float16"),
        ((ONES[::2], PACKED, 8, 4), ValueError, "values: expected a contiguous 1-D array"),
    ],
)
def test_wrong_arguments_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        quantization.quantize(*arguments)


def test_a_sum_of_nothing_is_refused():
    with pytest.raises(ValueError, match="packed_list: expected at least one array, got none"):
        quantization.dequantize_sum([], ONES.copy(), 8, 4)


def test_a_size_that_no_number_of_values_has_is_refused():
    with pytest.raises(ValueError, match="nbytes: expected the size of a packed form, got 11"):
        packed_numel(11, 8, 4)


# -- what is lost ------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("n", [1, 98, 20_001])
def test_the_error_and_what_arrives_add_up_to_the_values(bits, n):
    values = np.random.default_rng(n).standard_normal(n).astype(np.float32)
    packed = quantized(values, bits, 32)
    error = np.full(n, np.nan, np.float32)
    quantization.quantization_error(values, packed, error, bits, 32)
    assert_same_bits(error, values - dequantized(packed, n, bits, 32))
    quantization.quantization_error(values, packed, values, bits, 32)  # in place
    assert_same_bits(values, error)


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_the_error_of_a_block_that_is_not_finite_is_zero(bad):
    values = np.linspace(-1, 1, 96, dtype=np.float32)
    values[40] = bad
    error = np.empty(96, np.float32)
    quantization.quantization_error(values, quantized(values, 4, 32), error, 4, 32)
    assert np.flatnonzero(error[32:64]).size == 0
    assert np.flatnonzero(error[:32]).size > 0


@pytest.mark.parametrize(
    ("values", "out", "error", "message"),
    [
        (np.zeros(8, np.float16), np.zeros(8, np.float32), TypeError, "values: expected float32"),
        (np.zeros(8, np.float32), np.zeros(8, np.uint16), TypeError, "out: expected float32"),
        (np.zeros(8, np.float32), np.zeros(9, np.float32), ValueError, "out: expected shape"),
    ],
)
def test_an_error_of_other_arrays_is_refused(values, out, error, message):
    with pytest.raises(error, match=message):
        quantization.quantization_error(values, np.zeros(12, np.uint8), out, 8, 32)
