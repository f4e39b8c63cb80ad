"""The sum of what several ranks brought: in a fixed order, in blocks that stay in the cache."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from torch import Tensor

from zerompi import device
from zerompi.arrays import as_numpy
from zerompi.dtypes import SAME_SUM, accumulate_dtype
from zerompi.kernels import summation_on_host
from zerompi.kernels.summation import launch_sum_in_order
from zerompi.memory import DeviceArray, Flat

# What one thread sums at a time: a block of the accumulator stays in a core's own cache while the
# summands stream through. Larger ones do not fit; smaller ones cost more calls than sums.
_BLOCK_NBYTES = 512 << 10
_NARROW_BLOCK_NBYTES = 256 << 10  # beside a converted summand of the same size

# NumPy's calls cost less than torch's, but use one thread.
_NUMPY = (torch.float32, torch.float64)

# What has a compiled sum, if Numba is there: as fast on one thread as torch's calls on some four.
COMPILED = (torch.float16, torch.bfloat16)
_MOST_THREADS = 3

_log = logging.getLogger("zerompi")


def sum_in_order(summands: Sequence[Flat], out: Flat, scale: float) -> None:
    """`out` = `scale` times the sum of `summands`, accumulated from the first to the last.

    `out` may be one of the summands. All are 1-D and of one dtype; see `accumulate_dtype`. Integers
    have no scale but 1.
    """
    if not out.numel():
        return
    if isinstance(out, DeviceArray):
        _sum_on_device(summands, out, scale)
    else:
        _sum_on_host(summands, out, scale)


def _sum_on_device(summands: Sequence[Flat], out: DeviceArray, scale: float) -> None:
    """The same on a device: by a kernel, or on the host for dtypes that have none."""
    arrays = [summand for summand in summands if isinstance(summand, DeviceArray)]
    if not launch_sum_in_order(arrays, out, scale):
        copies = [device.to_host(array) for array in arrays]
        _sum_on_host(copies, copies[0], scale)
        device.from_host(out, copies[0])


def _sum_on_host(summands: Sequence[Any], out: Tensor, scale: float) -> None:
    if out.dtype in SAME_SUM:
        out = out.view(SAME_SUM[out.dtype])
        summands = [summand.view(out.dtype) for summand in summands]
    wide = accumulate_dtype(out.dtype)
    if len(summands) == 1 and scale == 1.0:
        out.copy_(summands[0])
        return
    threads = torch.get_num_threads()
    if out.dtype in COMPILED and threads <= _MOST_THREADS:
        compiled = compiled_sum(out.dtype)
        if compiled is not None:
            compiled(summands, out, scale)
            return
    nbytes = threads * (_BLOCK_NBYTES if wide is out.dtype else _NARROW_BLOCK_NBYTES)
    block = max(1, nbytes // wide.itemsize)
    is_direct = wide is out.dtype and all(
        summand.data_ptr() != out.data_ptr() for summand in summands[1:]
    )
    if is_direct and threads == 1 and wide in _NUMPY:
        _sum_blocks(
            [as_numpy(s) for s in summands], as_numpy(out), scale, block, np.add, np.multiply
        )
    elif is_direct and wide is not torch.bool:
        _sum_blocks(summands, out, scale, block, torch.add, torch.mul)
    else:
        _sum_through_accumulator(summands, out, scale, block, wide)


@cache
def compiled_sum(dtype: torch.dtype) -> summation_on_host.SumOnHost | None:
    """The compiled sum of one of `COMPILED`; None if Numba is not installed, or fails, which is logged."""
    if not summation_on_host.is_installed():
        return None
    try:
        return summation_on_host.SumOnHost(dtype)
    except Exception as error:
        # A package that does not fit another one fails in any way; torch's sums have the same bits.
        level = logging.WARNING if MPI.COMM_WORLD.rank == 0 else logging.INFO
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        _log.log(level, "sums of %s are not compiled, so slower: %s", dtype, reason)
        return None


def _sum_blocks(
    summands: Sequence[Any],
    out: Any,
    scale: float,
    block: int,
    add: Callable[..., Any],
    multiply: Callable[..., Any],
) -> None:
    """The sum block by block, accumulated in `out`; with NumPy's operations or torch's."""
    first, *rest = summands
    for start in range(0, len(out), block):
        part = slice(start, start + block)
        target = out[part]
        if rest:
            add(first[part], rest[0][part], out=target)
        else:
            target[:] = first[part]
        for summand in rest[1:]:
            add(target, summand[part], out=target)
        if scale != 1.0:
            multiply(target, scale, out=target)


def _sum_through_accumulator(
    summands: Sequence[Tensor], out: Tensor, scale: float, block: int, wide: torch.dtype
) -> None:
    """The sum block by block, in an accumulator of the wide dtype."""
    length = min(block, out.numel())
    total = torch.empty(length, dtype=wide)
    spare = torch.empty(0 if wide is out.dtype else length, dtype=wide)
    for target, *parts in zip(
        out.split(block), *(summand.split(block) for summand in summands), strict=True
    ):
        accumulator = total[: target.numel()]
        accumulator.copy_(parts[0])
        for part in parts[1:]:
            if wide is torch.bool:
                accumulator |= part
            elif wide is out.dtype:
                accumulator += part
            else:
                converted = spare[: target.numel()]
                converted.copy_(part)
                accumulator += converted
        if scale != 1.0:
            accumulator.mul_(scale)
        target.copy_(accumulator)
