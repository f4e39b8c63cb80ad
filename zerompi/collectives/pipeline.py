"""A collective on one chunk after the other: while the messages of one travel, the next is worked on.

Between nodes a collective is a row of sums and exchanges. Chunk by chunk, each waiting for the last, the
network would rest while the cores sum, and the cores while messages travel.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

# The work on one chunk, which yields whenever its messages have started and others may go on.
Chunk = Iterator[None]

_OVER = object()


def overlapped(chunks: Iterable[Chunk]) -> None:
    """Work on all chunks; start the messages of each before those of the one before are waited for.

    A chunk has one exchange under way, and the next chunk is one exchange behind it: with e exchanges,
    e + 1 chunks are in memory. On all ranks exchanges start and end in one order, which
    `Group.start_exchange` asks for.
    """
    under_way: list[Chunk] = []  # the newest first
    for chunk in chunks:
        under_way = _further([chunk, *under_way])
    while under_way:
        under_way = _further(under_way)


def _further(chunks: Iterable[Chunk]) -> list[Chunk]:
    """Let each chunk go on to its next exchange; return those that are not over."""
    return [chunk for chunk in chunks if next(chunk, _OVER) is not _OVER]
