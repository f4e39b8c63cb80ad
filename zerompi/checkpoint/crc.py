"""CRC-32 of what lies one behind the other, from the CRC-32 of its parts.

With generator polynomial P, the CRC of A followed by B is crc(A) x^(8 |B|) + crc(B) modulo P: Ross N.
Williams, "A painless guide to CRC error detection algorithms" (1993), has the arithmetic. Numbers are
polynomials over GF(2) with the coefficient of x^0 in the highest of 32 bits, as zlib has them.
"""

from __future__ import annotations

import numpy as np

_GENERATOR = np.uint32(0xEDB88320)
_ONE, _X8 = np.uint32(1 << 31), np.uint32(1 << 23)


def join_crc32s(crc32s: np.ndarray, nbytes_behind: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """The CRC-32 of several sequences of bytes, from those of their parts.

    Args:
        crc32s: of the parts, in order, as `zlib.crc32` gives them; (parts,) int64.
        nbytes_behind: of the parts behind each in its sequence; (parts,) int64.
        starts: at which part each sequence begins; (sequences,), ascending, none of them empty.
    """
    shifted = _multiply(crc32s.astype(np.uint32), _shift(nbytes_behind))
    return np.bitwise_xor.reduceat(shifted, starts).astype(np.int64)


def _shift(nbytes: np.ndarray) -> np.ndarray:
    """x^(8 n) modulo the generator for each n."""
    result = np.full(nbytes.shape, _ONE, dtype=np.uint32)
    power, rest = np.array([_X8]), nbytes.copy()
    while rest.any():
        result = np.where(rest & 1, _multiply(result, power), result)
        power = _multiply(power, power)
        rest >>= 1
    return result


def _multiply(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The product modulo the generator, element by element."""
    product = np.zeros(np.broadcast_shapes(a.shape, b.shape), dtype=np.uint32)
    for bit in range(31, -1, -1):
        product ^= b * (a >> np.uint32(bit) & np.uint32(1))
        b = b >> np.uint32(1) ^ _GENERATOR * (b & np.uint32(1))
    return product
