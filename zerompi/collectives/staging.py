"""Blocks of arrays that lie anywhere, passed on inside a node through shared staging memory."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from zerompi.arrays import copy_values
from zerompi.collectives.node import Node
from zerompi.collectives.shared import STAGING_NBYTES
from zerompi.memory import Flat

_ALIGNMENT = 64


def chunk_numel(num_blocks: int, dtype: torch.dtype) -> int:
    """How many elements of each of `num_blocks` blocks fit into the staging memory."""
    return max(1, (STAGING_NBYTES // num_blocks - _ALIGNMENT) // dtype.itemsize)


def exchange(node: Node, blocks: Mapping[int, Flat], slots: int) -> list[list[Flat]]:
    """Let the ranks of the node read some of each other's blocks. Collective over the node.

    The two halves of the memory are used by turns. A half is written again only after another
    fence, at which every rank has arrived with what it read from the half.

    Args:
        node: the ranks.
        blocks: 1-D, by slot; what this rank shows. At most `chunk_numel(slots, dtype)` elements each.
        slots: how many slots there are; the same on all ranks.

    Returns:
        Of each rank, the memory of each slot, uint8; valid until the next but one call.
    """
    node.half = 1 - node.half
    rows = node.rows(node.half, slots, STAGING_NBYTES // slots // _ALIGNMENT * _ALIGNMENT)
    for slot, block in blocks.items():
        copy_values(rows[node.comm.rank][slot][: block.nbytes], block)
    node.cross()
    return rows
