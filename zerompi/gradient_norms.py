"""Norms of gradients, and whether they are finite.

On the host piece by piece. On a device that would be a launch and a wait for each piece: there pieces
that follow each other in memory are taken together, and the host waits once for all.
"""

from __future__ import annotations

import cmath
import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from zerompi import device
from zerompi.kernels.norm import launch_sums_of_squares

# Elements whose norm is summed in float32: few enough that hardly any bit is lost.
_ROW = 4096

_KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def squares_on_device(gradients: Iterable[Tensor]) -> list[float] | None:
    """Sums of squares, in float64, whose sum is that of all gradients; not finite if one is not.

    None if a kernel is lacking: for another dtype, or a gradient that is not contiguous or not on the device.
    """
    parts = [gradient for gradient in gradients if gradient.numel()]
    if not parts:
        return []
    for part in parts:
        if part.dtype not in _KERNEL_DTYPES or not part.is_contiguous() or not device.holds(part):
            return None
    return sums_of_squares(joined(parts))


def sums_of_squares(tensors: Sequence[Tensor]) -> list[float]:
    """The sum of squares of each tensor; the host waits once, for all.

    Args:
        tensors: 1-D, in device memory, float32, float16 or bfloat16; at least one.
    """
    with device.beside(tensors[0]):
        sums = launch_sums_of_squares([device.as_cupy(tensor) for tensor in tensors])
        numbers: list[float] = sums.get().tolist()
    return numbers


def joined(parts: Sequence[Tensor]) -> list[Tensor]:
    """The same elements, 1-D; what is adjacent in one storage is one tensor."""
    flats: list[Tensor] = []
    for part in parts:
        flat = part.detach().view(-1)
        if flats and continues(flats[-1], flat):
            numel = flats[-1].numel() + flat.numel()
            flats[-1] = flats[-1].as_strided((numel,), (1,))
        else:
            flats.append(flat)
    return flats


def continues(first: Tensor, second: Tensor) -> bool:
    """Whether `second` follows `first` in the same storage; both are contiguous."""
    storages = [tensor.untyped_storage().data_ptr() for tensor in (first, second)]
    return (
        first.dtype is second.dtype
        and storages[0] == storages[1]
        and first.data_ptr() + first.nbytes == second.data_ptr()
    )


def is_finite(gradient: Tensor) -> bool:
    """Whether all elements are; a sum tells it in one pass, unless it overflows itself."""
    total = gradient.sum(dtype=torch.promote_types(gradient.dtype, torch.float32)).item()
    return cmath.isfinite(total) or bool(torch.isfinite(gradient).all())


def norm(gradient: Tensor, norm_type: float) -> float:
    """The norm of one gradient: of each row of it in float32 at least, and of these norms in float64.

    All of it in float64 where a row overflows, so that it is infinite or NaN only if an element is, or if
    float64 cannot hold it.
    """
    real = (gradient.abs() if gradient.is_complex() else gradient).reshape(-1)
    whole = real.numel() // _ROW * _ROW
    rows = [real[:whole].view(-1, _ROW), real[whole:].view(1, -1)]
    total = 0.0
    for dtype in (torch.promote_types(real.dtype, torch.float32), torch.float64):
        norms = [
            torch.linalg.vector_norm(part, norm_type, dim=1, dtype=dtype).double()
            for part in rows
            if part.numel()
        ]
        total = float(torch.linalg.vector_norm(torch.cat(norms), norm_type))
        if math.isfinite(total):
            break
    return total


def power(value: float, exponent: float) -> float:
    """`value` to the power of `exponent`; infinite where that is too large."""
    try:
        return float(value**exponent)
    except OverflowError:
        return math.inf
