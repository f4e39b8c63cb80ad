"""The sum of what several ranks brought: in a fixed order, in blocks that stay in the cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zerompi.dtypes import SAME_SUM, accumulate_dtype

# Elements summed at a time. A block of the accumulator stays in a core's own cache while the
# summands stream through; larger ones do not fit, smaller ones cost more calls than sums.
_BLOCK_NBYTES = 512 << 10


def sum_in_order(summands: Sequence[Tensor], out: Tensor, scale: float) -> None:
    """`out` = `scale` times the sum of `summands`, accumulated from the first to the last.

    `out` may be one of the summands. All are 1-D and of one dtype; see `accumulate_dtype`. Integers
    have no scale but 1.
    """
    if not out.numel():
        return
    if out.dtype in SAME_SUM:
        out = out.view(SAME_SUM[out.dtype])
        summands = [summand.view(out.dtype) for summand in summands]
    wide = accumulate_dtype(out.dtype)
    block = max(1, _BLOCK_NBYTES // wide.itemsize)
    is_direct = wide is out.dtype and all(
        summand.data_ptr() != out.data_ptr() for summand in summands[1:]
    )
    total = torch.empty(0 if is_direct else min(block, out.numel()), dtype=wide)
    spare = torch.empty(0 if wide is out.dtype else total.numel(), dtype=wide)
    for target, *parts in zip(
        out.split(block), *(summand.split(block) for summand in summands), strict=True
    ):
        length = target.numel()
        accumulator = target if is_direct else total[:length]
        _sum_block(parts, accumulator, spare[:length])
        if scale != 1.0:
            accumulator.mul_(scale)
        if not is_direct:
            target.copy_(accumulator)


def _sum_block(parts: Sequence[Tensor], total: Tensor, spare: Tensor) -> None:
    """`total` = the sum of `parts`; `spare` is overwritten where they have a narrower dtype."""
    if parts[0].dtype is not total.dtype:
        total.copy_(parts[0])
        for part in parts[1:]:
            spare.copy_(part)
            total += spare
        return
    if len(parts) == 1:
        total.copy_(parts[0])
        return
    add = torch.logical_or if total.dtype is torch.bool else torch.add
    add(parts[0], parts[1], out=total)
    for part in parts[2:]:
        add(total, part, out=total)
