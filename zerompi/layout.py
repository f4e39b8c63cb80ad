"""Offsets of parameters in a flat buffer, and who owns which elements.

Pure arithmetic: no MPI, no torch. All numbers are counts of elements; ranges are half-open.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple


class Range(NamedTuple):
    """Elements [start, stop)."""

    start: int
    stop: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.stop - self.start


class Piece(NamedTuple):
    """The part of one parameter that lies in one shard; all three ranges have the same length."""

    in_parameter: Range
    in_shard: Range
    in_flat: Range


class FlatLayout:
    """Parameters one after another in a flat buffer that is cut into equal shards.

    For shapes (5,) and (2, 3) over 4 shards::

        offset    0  1  2  3  4 | 5  6  7  8  9 10 | 11
                  a  a  a  a  a | b  b  b  b  b  b | pad
        shard     0  0  0  1  1   1  2  2  2  3  3   3

    The end is padded to a multiple of the number of shards. `shard_ranges` leave the
    padding out, so that it never travels; trailing shards may be short or empty.
    """

    def __init__(self, shapes: Sequence[Sequence[int]], num_shards: int) -> None:
        if num_shards < 1:
            raise ValueError(f"num_shards: expected at least 1, got {num_shards}")
        self.shapes = tuple(tuple(shape) for shape in shapes)
        self.num_shards = num_shards
        numels = [prod(shape) for shape in self.shapes]
        self.numel = sum(numels)
        self.shard_numel = -(-self.numel // num_shards)
        self.padded_numel = self.shard_numel * num_shards
        ranges = []
        offset = 0
        for numel in numels:
            ranges.append(Range(offset, offset + numel))
            offset += numel
        self.parameter_ranges = tuple(ranges)
        self.shard_ranges = tuple(
            Range(
                min(index * self.shard_numel, self.numel),
                min((index + 1) * self.shard_numel, self.numel),
            )
            for index in range(num_shards)
        )

    def piece(self, parameter: int, shard: int) -> Piece:
        """The part of parameter number `parameter` in shard number `shard`, perhaps empty."""
        whole, own = self.parameter_ranges[parameter], self.shard_ranges[shard]
        start = min(max(whole.start, own.start), whole.stop)
        stop = max(min(whole.stop, own.stop), start)
        base = shard * self.shard_numel
        if start == stop:
            return Piece(Range(0, 0), Range(0, 0), Range(start, start))
        return Piece(
            Range(start - whole.start, stop - whole.start),
            Range(start - base, stop - base),
            Range(start, stop),
        )
