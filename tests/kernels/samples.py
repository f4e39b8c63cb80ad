"""Numbers that are hard to round, and what "the same bits" means."""

from __future__ import annotations

from typing import Any

import numpy as np

from zerompi.kernels import casting

Array = np.ndarray[Any, Any]

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}
LARGEST = np.finfo(np.float32).max
SMALLEST = np.float32(2.0**-149)


def as_dtype(values: Array, dtype: str) -> Array:
    """Float32 values in one of `DTYPES`."""
    if dtype == "float32":
        return values
    out = np.empty(values.shape, DTYPES[dtype])
    casting.cast(values, out)
    return out


def as_float32(values: Array) -> Array:
    """Values of any of `DTYPES` as float32; uint16 is bfloat16."""
    if values.dtype == np.float32:
        return values
    out = np.empty(values.shape, np.float32)
    casting.cast(values, out)
    return out


def random_blocks(blocks: int, block: int, seed: int) -> Array:
    """Float32, (blocks * block,): of all magnitudes, some of one magnitude, some with NaN or infinities."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((blocks, block), np.float32)
    with np.errstate(over="ignore"):
        values *= np.exp2(rng.integers(-150, 127, (blocks, 1))).astype(np.float32)
    kind = rng.integers(0, 20, blocks)
    anything = rng.integers(0, 2**32, (blocks, block), np.uint32).view(np.float32)
    finite = np.where(np.isfinite(anything), anything, np.float32(0))
    values[kind == 1] = finite[kind == 1]
    values[kind == 2] = anything[kind == 2]
    values[kind == 3, block // 2] = np.inf
    values[kind == 4] = 0
    values[kind == 5] = LARGEST
    values[kind == 6] = rng.integers(-300, 300, (blocks, block))[kind == 6] * SMALLEST
    return values.reshape(-1)


def assert_same_bits(actual: Any, expected: Array) -> None:
    """NumPy or CuPy `actual` has the bits of `expected`, but any NaN equals any other."""
    actual = actual if isinstance(actual, np.ndarray) else actual.get()
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    differs = bits(actual) != bits(expected)
    if actual.dtype.kind == "f":
        differs &= ~(np.isnan(actual) & np.isnan(expected))
    where = np.flatnonzero(differs)
    assert not where.size, (
        f"{where.size} of {actual.size} differ, first at {where[0]}: "
        f"{actual[where[0]]} instead of {expected[where[0]]}"
    )


def bits(values: Array) -> Array:
    """As unsigned integers."""
    return values.view(f"u{values.itemsize}")
