"""Block quantization to 8 and 4 bits.

A flat array of n values is cut into blocks of `block` values; the last may be short. With m the
largest magnitude in a block and q the largest code (127 for 8 bits, 7 for 4):

    scale = m / q        float32, rounded so that float32(scale * q) >= m and that q * scale is finite
    code  = x / scale    rounded to the nearest integer, ties to even; all zero if m is zero
    x'    = code * scale

A block with an infinity or a NaN has the scale NaN, so all its values come back as NaN: an overflow
is never lost.

Packed, in one array of bytes without padding:

    | float32 scales, one per block | codes, in the order of the values |

A code of 8 bits is a byte; two codes of 4 bits share one, the earlier in the low bits. Codes are in
two's complement. With an odd n the last high half is zero.

For every finite block and value

    |x - x'| <= m / (2 q) * (1 + (2 q + 2) * 2^-23) + 2^-149

The scale exceeds m / q by a factor of at most 1 + 2^-23, or by 2^-149 where it is subnormal; the
quotient, of magnitude at most q, and the product carry a rounding error of 2^-24 each; rounding to
an integer adds half a scale. The scale of the largest float32 is rounded down, by less than 2^-23.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from zerompi.kernels.casting import narrow, require_flat, widen

Array = np.ndarray[Any, Any]

LARGEST_CODE = {8: 127, 4: 7}
_LARGEST_SCALE = {
    # The largest whose product with the largest code is finite.
    8: np.float32(float.fromhex("0x1.020406p+121")),
    4: np.float32(float.fromhex("0x1.249248p+125")),
}
_MAGNITUDE = np.int32(0x7FFFFFFF)
_INFINITY = np.int32(0x7F800000)
# Added to a small float32, leaves its nearest integer (ties to even) in the low bits of the sum.
_ROUNDER = np.float32(1.5 * 2**23)
# Values that are worked on at a time, so that they and their copies stay in a core's own cache.
_CHUNK = 32 << 10


def packed_nbytes(n: int, bits: int, block: int) -> int:
    """Bytes of `n` values in packed form."""
    _check_format(bits, block)
    return 4 * _ceil(n, block) + _ceil(n * bits, 8)


def packed_numel(nbytes: int, bits: int, block: int) -> int:
    """How many values a packed form of `nbytes` holds; an odd number of 4 bits counts one more.

    Raises:
        ValueError: no number of values is packed into `nbytes`.
    """
    _check_format(bits, block)
    blocks, rest = divmod(nbytes, 4 + block * bits // 8)
    if 0 < rest <= 4:
        raise ValueError(f"nbytes: expected the size of a packed form, got {nbytes}")
    return blocks * block + max(rest - 4, 0) * 8 // bits


def quantize(values: Array, packed: Array, bits: int, block: int) -> None:
    """Quantize float32, float16 or bfloat16 `values` (1-D) into `packed` (uint8, `packed_nbytes`).

    Raises:
        TypeError: other dtypes.
        ValueError: other shapes, bits other than 8 and 4, or a block that is not positive and even.
    """
    require_flat("values", values)
    check_packed("packed", packed, values.size, bits, block)
    target = _fields(packed, values.size, block)
    work, wide = np.empty((2, _chunk_size(values.size, block)), np.float32)
    with np.errstate(all="ignore"):
        for piece in _pieces(values.size, block):
            part = values[piece.values]
            if part.itemsize == 2:
                widen(part, wide[: part.size])
                part = wide[: part.size]
            _quantize_piece(part, piece, target, work, bits)


def dequantize(packed: Array, out: Array, bits: int, block: int) -> None:
    """The values of `packed` into `out` (float32, float16 or bfloat16); raises as `quantize` does."""
    dequantize_sum([packed], out, bits, block)


def dequantize_sum(
    packed_list: Sequence[Array], out: Array, bits: int, block: int, scale: float = 1.0
) -> None:
    """`out` = `scale` times the sum of what the packed arrays stand for.

    Accumulated in float32, from the first to the last; then multiplied with float32(scale); then
    rounded to the dtype of `out`.

    Raises:
        TypeError, ValueError: as `quantize`, or if there is no array to sum.
    """
    require_flat("out", out)
    check_packed_list(packed_list, out.size, bits, block)
    sources = [_fields(packed, out.size, block) for packed in packed_list]
    work, wide = np.empty((2, _chunk_size(out.size, block)), np.float32)
    with np.errstate(all="ignore"):
        for piece in _pieces(out.size, block):
            part = out[piece.values]
            total = wide[: part.size] if part.itemsize == 2 else part
            _sum_piece(sources, total, piece, work, bits, np.float32(scale))
            if total is not part:
                narrow(total, part)


def dequantize_sum_quantize(
    packed_list: Sequence[Array], packed_out: Array, bits: int, block: int, scale: float = 1.0
) -> None:
    """Quantize what `dequantize_sum` would give in float32, without holding it; the same bits.

    `packed_out` is of the size of the others and overlaps none of them. Raises as `dequantize_sum`.
    """
    n = packed_numel(packed_out.size, bits, block)
    check_packed("packed_out", packed_out, n, bits, block)
    check_packed_list(packed_list, n, bits, block)
    sources = [_fields(packed, n, block) for packed in packed_list]
    target = _fields(packed_out, n, block)
    work, total = np.empty((2, _chunk_size(n, block)), np.float32)
    with np.errstate(all="ignore"):
        for piece in _pieces(n, block):
            part = total[: piece.rows * piece.width]
            _sum_piece(sources, part, piece, work, bits, np.float32(scale))
            _quantize_piece(part, piece, target, work, bits)


def quantization_error(values: Array, packed: Array, out: Array, bits: int, block: int) -> None:
    """`out` = float32 `values` less what `packed` stands for; zero where that is not finite.

    `out` may be `values`. Raises as `quantize` does.
    """
    check_error_arrays(values, packed, out, bits, block)
    source = _fields(packed, values.size, block)
    work, arrived = np.empty((2, _chunk_size(values.size, block)), np.float32)
    with np.errstate(all="ignore"):
        for piece in _pieces(values.size, block):
            part = arrived[: piece.rows * piece.width]
            _sum_piece([source], part, piece, work, bits, np.float32(1))
            error = np.subtract(values[piece.values], part, out=out[piece.values])
            is_lost = ~np.isfinite(error)
            if is_lost.any():
                error[is_lost] = 0


# -- the packed form ---------------------------------------------------------------------------


class _Fields(NamedTuple):
    """Views of a packed array."""

    scales: Array  # float32, (blocks,)
    codes: Array  # uint8, (ceil(n * bits / 8),)


class _Piece(NamedTuple):
    """Some whole blocks of one width, the last block of all if it is short."""

    values: slice
    blocks: slice
    rows: int
    width: int

    def codes(self, bits: int) -> slice:
        """Where the codes stand among all of them, in bytes."""
        return slice(self.values.start * bits // 8, _ceil(self.values.stop * bits, 8))


def check_packed(name: str, packed: Any, n: int, bits: int, block: int) -> None:
    """Refuse what is not `n` values in packed form; raises as `quantize` does."""
    nbytes = packed_nbytes(n, bits, block)
    if packed.dtype != np.uint8:
        raise TypeError(f"{name}: expected uint8, got {packed.dtype}")
    if packed.shape != (nbytes,) or not packed.flags.c_contiguous:
        raise ValueError(
            f"{name}: expected {nbytes} contiguous bytes for {n} values of {bits} bits in blocks of "
            f"{block}, got shape {packed.shape}"
        )


def check_packed_list(packed_list: Sequence[Any], n: int, bits: int, block: int) -> None:
    """`check_packed` for each; there must be one."""
    if not packed_list:
        raise ValueError("packed_list: expected at least one array, got none")
    for index, packed in enumerate(packed_list):
        check_packed(f"packed_list[{index}]", packed, n, bits, block)


def check_error_arrays(values: Any, packed: Any, out: Any, bits: int, block: int) -> None:
    """Refuse what `quantization_error` cannot work on."""
    for name, array in (("values", values), ("out", out)):
        require_flat(name, array)
        if array.dtype != np.float32:
            raise TypeError(f"{name}: expected float32, got {array.dtype}")
    if out.shape != values.shape:
        raise ValueError(f"out: expected shape {values.shape}, got {out.shape}")
    check_packed("packed", packed, values.size, bits, block)


def _fields(packed: Array, n: int, block: int) -> _Fields:
    split = 4 * _ceil(n, block)
    return _Fields(packed[:split].view(np.float32), packed[split:])


def _check_format(bits: int, block: int) -> None:
    if bits not in LARGEST_CODE:
        raise ValueError(f"bits: expected 8 or 4, got {bits}")
    if block <= 0 or block % 2:
        raise ValueError(f"block: expected a positive even number, got {block}")


def _pieces(n: int, block: int) -> Iterator[_Piece]:
    """Pieces of about `_CHUNK` values."""
    whole = n - n % block
    step = max(_CHUNK // block, 1) * block
    for start in range(0, whole, step):
        stop = min(start + step, whole)
        rows = (stop - start) // block
        yield _Piece(slice(start, stop), slice(start // block, stop // block), rows, block)
    if whole < n:
        yield _Piece(slice(whole, n), slice(whole // block, whole // block + 1), 1, n - whole)


def _chunk_size(n: int, block: int) -> int:
    """Values in the largest piece."""
    return min(n, max(_CHUNK, block))


def _ceil(value: int, divisor: int) -> int:
    return -(-value // divisor)


# -- one piece ---------------------------------------------------------------------------------


def _quantize_piece(values: Array, piece: _Piece, target: _Fields, work: Array, bits: int) -> None:
    """`work` is overwritten; `values` may not be part of it."""
    shape = (piece.rows, piece.width)
    scratch = work[: values.size]
    magnitudes = scratch.view(np.int32)
    # Of floating-point numbers without a sign, the bits are in the order of the numbers.
    np.bitwise_and(values.view(np.int32), _MAGNITUDE, out=magnitudes)
    largest = magnitudes.reshape(shape).max(axis=1)
    scales = _scales(largest, bits)
    target.scales[piece.blocks] = scales
    divisors = np.where(scales > 0, scales, np.float32(1))
    np.divide(values.reshape(shape), divisors[:, None], out=scratch.reshape(shape))
    np.add(scratch, _ROUNDER, out=scratch)
    is_lost = largest >= _INFINITY
    if is_lost.any():
        scratch.reshape(shape)[is_lost] = _ROUNDER
    _store_codes(scratch.view(np.int32), target.codes[piece.codes(bits)], bits)


def _scales(largest: Array, bits: int) -> Array:
    """The scale of each block, from the bits of its largest magnitude."""
    peaks = largest.view(np.float32)
    scales: Array = peaks / np.float32(LARGEST_CODE[bits])
    # A rounded-down scale matters where it is subnormal: a quotient could exceed the largest code.
    scales.view(np.int32)[...] += scales * np.float32(LARGEST_CODE[bits]) < peaks
    np.minimum(scales, _LARGEST_SCALE[bits], out=scales)
    scales[largest >= _INFINITY] = np.nan
    return scales


def _store_codes(numbers: Array, codes: Array, bits: int) -> None:
    """Store the low bits of int32 numbers."""
    if bits == 8:
        np.copyto(codes.view(np.int8), numbers, casting="unsafe")
        return
    narrow = np.zeros(2 * codes.size, np.int8)
    np.copyto(narrow[: numbers.size], numbers, casting="unsafe")
    pairs = narrow.view(np.uint16)
    high = pairs >> 4
    high &= 0xF0
    pairs &= 0x0F
    pairs |= high
    np.copyto(codes, pairs, casting="unsafe")


def _load_codes(codes: Array, n: int, bits: int) -> Array:
    """The codes as int8."""
    if bits == 8:
        return codes.view(np.int8)
    pairs = codes.astype(np.uint16)
    pairs |= pairs << 4
    pairs &= 0x0F0F
    pairs ^= 0x0808  # adds 8 to a code of four bits; its sign bit is now that of no number
    signed = pairs.view(np.int8)
    signed -= 8
    return signed[:n]


def _sum_piece(
    sources: Sequence[_Fields],
    total: Array,
    piece: _Piece,
    work: Array,
    bits: int,
    scale: np.float32,
) -> None:
    """The sum of a piece into `total`; `work` is overwritten and no part of it."""
    shape = (piece.rows, piece.width)
    part = total
    for source in sources:
        codes = _load_codes(source.codes[piece.codes(bits)], total.size, bits)
        scales = source.scales[piece.blocks, None]
        np.multiply(codes.reshape(shape), scales, out=part.reshape(shape))
        if part is not total:
            np.add(total, part, out=total)
        part = work[: total.size]
    if scale != 1:
        np.multiply(total, scale, out=total)
