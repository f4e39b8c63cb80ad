"""Kernels give the bits of their NumPy twins: over 10,000 random blocks, in all dtypes.

Needs CuPy and a CUDA device, or an emulated one.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from kernels.samples import (
    DTYPES,
    LARGEST,
    as_dtype,
    assert_same_bits,
    random_blocks,
)
from zerompi.device import compiler
from zerompi.kernels import (
    adamw,
    casting,
    norm,
    packing,
    quantization,
    quantization_on_device,
)

BLOCKS = 10_000
BLOCK = 64
BITS = [8, 4]
NARROW = ["float16", "bfloat16"]


@pytest.fixture
def few_blocks(monkeypatch):
    """So few blocks of threads that each has to go round several times."""
    monkeypatch.setattr(compiler, "MOST_BLOCKS", 3)


def samples(seed, dtype="float32", blocks=BLOCKS):
    return as_dtype(random_blocks(blocks, BLOCK, seed), dtype)


def quantized(values, bits, block=BLOCK):
    packed = np.empty(quantization.packed_nbytes(values.size, bits, block), np.uint8)
    quantization.quantize(values, packed, bits, block)
    return packed


# -- quantization ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", BITS)
def test_quantize_and_dequantize(cupy, bits, dtype):
    values = samples(1, dtype)
    expected = quantized(values, bits)
    packed = cupy.empty_like(cupy.asarray(expected))
    quantization_on_device.launch_quantize(cupy.asarray(values), packed, bits, BLOCK)
    assert_same_bits(packed, expected)

    restored = np.empty_like(values)
    quantization.dequantize(expected, restored, bits, BLOCK)
    out = cupy.empty_like(cupy.asarray(values))
    quantization_on_device.launch_dequantize(packed, out, bits, BLOCK)
    assert_same_bits(out, restored)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", BITS)
def test_dequantize_sum(cupy, bits, dtype):
    packed = [quantized(samples(seed), bits) for seed in range(3)]
    expected = np.empty(BLOCKS * BLOCK, DTYPES[dtype])
    quantization.dequantize_sum(packed, expected, bits, BLOCK, 1 / 3)
    out = cupy.empty_like(cupy.asarray(expected))
    on_device = [cupy.asarray(p) for p in packed]
    quantization_on_device.launch_dequantize_sum(on_device, out, bits, BLOCK, 1 / 3)
    assert_same_bits(out, expected)


@pytest.mark.parametrize("bits", BITS)
def test_dequantize_sum_quantize(cupy, bits):
    packed = [quantized(samples(seed), bits) for seed in range(3)]
    expected = np.empty_like(packed[0])
    quantization.dequantize_sum_quantize(packed, expected, bits, BLOCK, 1 / 3)
    on_device = [cupy.asarray(p) for p in packed]
    out = cupy.empty_like(on_device[0])
    quantization_on_device.launch_dequantize_sum_quantize(on_device, out, bits, BLOCK, 1 / 3)
    assert_same_bits(out, expected)


@pytest.mark.parametrize("bits", BITS)
def test_quantization_error(cupy, bits):
    values = samples(4)
    packed = quantized(values, bits)
    expected = np.empty_like(values)
    quantization.quantization_error(values, packed, expected, bits, BLOCK)
    out = cupy.empty_like(cupy.asarray(values))
    arrays = (cupy.asarray(values), cupy.asarray(packed), out)
    quantization_on_device.launch_quantization_error(*arrays, bits, BLOCK)
    assert_same_bits(out, expected)


@pytest.mark.usefixtures("few_blocks")
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(
    ("n", "block"), [(0, 64), (1, 64), (63, 2), (2047, 6), (3001, 66), (4099, 256), (5000, 4096)]
)
def test_quantization_in_blocks_of_any_size_from_any_address(cupy, bits, n, block):
    values = random_blocks(100, 64, seed=n)[:n]
    packed = quantized(values, bits, block)
    out = cupy.empty(packed.size + 1, np.uint8)[1:]
    quantization_on_device.launch_quantize(cupy.asarray(values), out, bits, block)
    assert_same_bits(out, packed)
    total = np.empty(n, np.float32)
    quantization.dequantize_sum([packed] * 2, total, bits, block)
    on_device = cupy.empty(n, np.float32)
    quantization_on_device.launch_dequantize_sum([out] * 2, on_device, bits, block)
    assert_same_bits(on_device, total)
    again = cupy.empty_like(out)
    quantization_on_device.launch_dequantize_sum_quantize([out] * 2, again, bits, block)
    assert_same_bits(again, quantized(total, bits, block))


# -- casting -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", NARROW)
def test_casts_to_narrow_dtypes(cupy, dtype):
    values = samples(5)
    out = cupy.empty(values.size, DTYPES[dtype])
    casting.launch_cast(cupy.asarray(values), out)
    assert_same_bits(out, as_dtype(values, dtype))


@pytest.mark.usefixtures("few_blocks")
@pytest.mark.parametrize("dtype", NARROW)
def test_casts_of_every_narrow_value(cupy, dtype):
    values = np.arange(2**16, dtype=np.uint16).view(DTYPES[dtype])
    expected = np.empty(2**16, np.float32)
    casting.cast(values, expected)
    wide = cupy.empty(2**16, np.float32)
    casting.launch_cast(cupy.asarray(values), wide)
    assert_same_bits(wide, expected)


# -- packing -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.uint8, np.float16, np.float32, np.float64])
@pytest.mark.parametrize("unit", [1, 16])
def test_pack_and_unpack(cupy, monkeypatch, dtype, unit):
    """All sizes and offsets are multiples of `unit` elements: of words of 16 bytes, or not."""
    rng = np.random.default_rng(unit)
    shapes = [(0,), (3, unit), (17_000 * unit,), (0,), *((unit * n,) for n in range(40))]
    arrays = [rng.integers(0, 99, shape).astype(dtype) for shape in shapes]
    sizes = [array.size + unit for array in arrays]
    offsets = [0, *np.cumsum(sizes)[:-1].tolist()]
    expected = np.full(sum(sizes), 111, dtype)
    packing.pack(arrays, offsets, expected)

    launched = []
    monkeypatch.setattr(
        packing, "launch", lambda *args: (launched.append(args[1]), compiler.launch(*args))
    )
    on_device = [cupy.asarray(array) for array in arrays]
    table = packing.DevicePacking(on_device, offsets)
    flat = cupy.full(expected.size, 111, dtype)
    table.pack(flat)
    assert_same_bits(flat, expected)

    for array in on_device:
        array.fill(0)
    shifted = cupy.zeros(flat.size + 1, dtype)[1:]  # aligned to single elements only
    shifted[:] = flat
    table.unpack(shifted)
    for array, values in zip(on_device, arrays, strict=True):
        assert_same_bits(array, values)
    itemsize = np.dtype(dtype).itemsize
    assert launched == [f"pack_{16 if unit == 16 else itemsize}", f"unpack_{itemsize}"]


def test_nothing_to_pack(cupy):
    flat = cupy.full(3, 5.0)
    packing.DevicePacking([], []).pack(flat)
    packing.DevicePacking([cupy.empty(0)], [3]).pack(flat)
    assert flat.tolist() == [5, 5, 5]


@pytest.mark.usefixtures("few_blocks")
def test_many_tiles_are_packed(cupy):
    arrays = [np.arange(n, dtype=np.float32) for n in (30_000, 1, 70_001)]
    table = packing.DevicePacking([cupy.asarray(array) for array in arrays], [0, 30_000, 30_001])
    flat = cupy.empty(100_002, np.float32)
    table.pack(flat)
    assert_same_bits(flat, np.concatenate(arrays))


# -- AdamW -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gradient", "parameters"),
    [
        *((dtype, None) for dtype in DTYPES),
        *(("float32", dtype) for dtype in NARROW),
        *((dtype, dtype) for dtype in NARROW),
    ],
)
def test_adamw(cupy, gradient, parameters):
    n = BLOCKS * BLOCK
    rng = np.random.default_rng(3)
    host = adamw.Shard(
        rng.standard_normal(n, np.float32),
        samples(0, gradient),
        np.zeros(n, np.float32),
        np.zeros(n, np.float32),
        None if parameters is None else np.zeros(n, DTYPES[parameters]),
    )
    names = [name for name, value in vars(host).items() if value is not None]
    device = adamw.Shard(**{name: cupy.asarray(getattr(host, name)) for name in names})
    hyper = adamw.Hyperparameters(lr=0.01, weight_decay=0.1)
    for step in (1, 2, 1000):
        values = samples(step, gradient)
        adamw.adamw(dataclasses.replace(host, gradient=values), hyper, step, 0.3)
        adamw.launch_adamw(
            dataclasses.replace(device, gradient=cupy.asarray(values)), hyper, step, 0.3
        )
    for name in names:
        assert_same_bits(getattr(device, name), getattr(host, name))


@pytest.mark.usefixtures("few_blocks")
def test_adamw_of_more_than_the_threads(cupy):
    ones = np.ones(5000, np.float32)
    host = adamw.Shard(*(ones.copy() for _ in range(4)))
    device = adamw.Shard(*(cupy.asarray(ones) for _ in range(4)))
    adamw.adamw(host, adamw.Hyperparameters(), 1)
    adamw.launch_adamw(device, adamw.Hyperparameters(), 1)
    assert_same_bits(device.weights, host.weights)


# -- norm --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("most_blocks", [3, compiler.MOST_BLOCKS])
def test_sum_of_squares(cupy, monkeypatch, dtype, most_blocks):
    monkeypatch.setattr(compiler, "MOST_BLOCKS", most_blocks)
    values = np.random.default_rng(7).standard_normal(BLOCKS * BLOCK + 1).astype(np.float32)
    values = as_dtype(values, dtype)
    out = norm.launch_sums_of_squares([cupy.asarray(values)])
    assert_same_bits(out, np.array([norm.sum_of_squares(values)]))


@pytest.mark.parametrize("n", [0, 1, 255, 257, 8191, 8193])
def test_sum_of_squares_of_any_size(cupy, n):
    values = np.full(n, LARGEST)
    out = norm.launch_sums_of_squares([cupy.asarray(values)])
    assert_same_bits(out, np.array([norm.sum_of_squares(values)]))


@pytest.mark.parametrize("bad", [np.inf, np.nan])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sum_of_squares_is_not_finite_if_a_value_is_not(cupy, dtype, bad):
    values = np.ones(9000, np.float32)
    values[8500] = bad
    out = norm.launch_sums_of_squares([cupy.asarray(as_dtype(values, dtype))])
    assert not math.isfinite(float(out[0]))
