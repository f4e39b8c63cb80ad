"""Where the flat buffers of a partition lie: with the ranks of a node together, or with each rank."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from zerompi.collectives.shared import PAGE_NBYTES, SharedNode, Window, has_room
from zerompi.context import Context
from zerompi.placement import Placement
from zerompi.regions import Region, Slot, aligned
from zerompi.segment import Segment
from zerompi.unit import Unit

_TURNS = (
    2  # of buckets: one is filled while the other is read; of slots: one is used, one is filled
)
# Small units are gathered together, up to this size and this part of all.
_GATHER_NBYTES = 4 << 20
_GATHER_PART = 1 / 16


def place(units: Sequence[Unit], context: Context) -> None:
    """Take memory for all parameters, and find places for the buckets. Collective over the world.

    With shared memory a node has one copy of the parameters, of which the parameters of all its
    ranks are views: for good where the ranks step shards only, and parameters are replicated or all
    shards are on the node; else in slots, while they are needed. Buckets lie where the other ranks of
    the node can read them.
    """
    group = context.shard_group
    _count_depths(units)
    copies = [_pages(s.full_nbytes) for s in _segments(units)] if _has_node_copies(context) else []
    slots = [] if copies else _slot_sizes(units, context, is_kept=context.node_group is not None)
    regions = _region_sizes(units, context)
    shared = group.window_node
    fits = shared is not None and has_room(
        sum(copies) + sum(map(sum, slots)) + sum(regions) * group.node_comm.size
    )
    node = shared if all(context.world.agree("place of the buffers", int(fits))) else None
    made = iter(_node_copies(node, units, copies, context) if node is not None else ())
    is_replicated = context.stage.optimizer_state is Placement.REPLICATE
    context.is_shared = node is not None and not is_replicated
    for unit in units:
        unit.allocate([next(made, None) for _ in unit.segments])
    if node is not None:
        _make_regions(node, units, regions, context)
    if not all(unit.is_resident for unit in units):
        _make_slots(node, units, context)


def _segments(units: Sequence[Unit]) -> Iterator[Segment]:
    for unit in units:
        yield from unit.segments


def _has_node_copies(context: Context) -> bool:
    stage = context.stage
    if stage.optimizer_state is Placement.REPLICATE:
        return False  # every rank steps, and writes, all of it
    return stage.parameter is Placement.REPLICATE or context.is_single_node


def _node_copies(
    node: SharedNode, units: Sequence[Unit], sizes: Sequence[int], context: Context
) -> list[Tensor]:
    if not sum(sizes):
        return []
    window = Window(node.comm, [sum(sizes), *[0] * (node.comm.size - 1)])
    context.windows.append(window)
    tensors = []
    offset = 0
    for segment, nbytes in zip(_segments(units), sizes, strict=True):
        tensors.append(window.parts(offset, segment.layout.padded_numel, segment.dtype)[0])
        offset += nbytes
    return tensors


# -- slots -------------------------------------------------------------------------------------


def _count_depths(units: Sequence[Unit]) -> None:
    """Tell each unit how many others enclose it: units of one depth take turns."""
    names = {unit.name for unit in units[1:]}
    for unit in units[1:]:
        parts = unit.name.split(".")
        prefixes = (".".join(parts[:length]) for length in range(1, len(parts)))
        unit.depth = 1 + sum(prefix in names for prefix in prefixes)


def _slot_sizes(units: Sequence[Unit], context: Context, *, is_kept: bool) -> list[list[int]]:
    """Bytes of the slots of each depth; where the node keeps what it gathers, of each unit."""
    if context.stage.parameter is Placement.REPLICATE:
        return []
    if is_kept:
        return [[unit.slot_nbytes for unit in units]]
    sizes = []
    for depth in range(1 + max(unit.depth for unit in units)):
        nbytes = [unit.slot_nbytes for unit in units if unit.depth == depth]
        together = min(_GATHER_NBYTES, int(_GATHER_PART * sum(nbytes)))
        sizes.append([aligned(max(*nbytes, together))] * min(_TURNS, len(nbytes)))
    return sizes


def _pages(nbytes: int) -> int:
    return -(-nbytes // PAGE_NBYTES) * PAGE_NBYTES


def _make_slots(node: SharedNode | None, units: Sequence[Unit], context: Context) -> None:
    """Slots in the node's memory; without that in each rank's own, also what the node keeps."""
    keeps, group = context.node_group is not None, context.shard_group
    if keeps and node is None:
        for segment in _segments(units):
            segment.allocate_secondary()
    sizes = _slot_sizes(units, context, is_kept=keeps and node is not None)
    total = sum(map(sum, sizes))
    if node is None or not total:
        rings = [[Slot(nbytes, group.allocate) for nbytes in ring] for ring in sizes]
    else:
        window = Window(node.comm, [total, *[0] * (node.comm.size - 1)])
        context.windows.append(window)
        context.memory.add("buffers", total // node.comm.size)
        memory = window.parts(0, total, torch.uint8)[0]
        parts = iter(memory.split([nbytes for ring in sizes for nbytes in ring]))
        rings = [[Slot(nbytes, group.allocate, next(parts)) for nbytes in ring] for ring in sizes]
    if keeps and node is not None:
        for unit, slot in zip(units, rings[0], strict=True):
            unit.slot = slot
    else:
        context.slots.extend(rings)


# -- buckets -----------------------------------------------------------------------------------


def _bucket_nbytes(unit: Unit) -> int:
    return sum(_aligned_bucket_nbytes(segment) for segment in unit.trainable)


def _aligned_bucket_nbytes(segment: Segment) -> int:
    return aligned(segment.layout.padded_numel * segment.gradients.dtype.itemsize)


def _region_sizes(units: Sequence[Unit], context: Context) -> list[int]:
    """One region for each unit where gradients are replicated; else for the root, and for turns."""
    sizes = [_bucket_nbytes(unit) for unit in units]
    if context.stage.gradient is Placement.REPLICATE:
        return sizes
    largest = max(sizes[1:], default=0)
    return [sizes[0], *[largest] * min(_TURNS, len(sizes) - 1)]


def _make_regions(
    node: SharedNode, units: Sequence[Unit], sizes: Sequence[int], context: Context
) -> None:
    if not sum(sizes):
        return
    window = Window(node.comm, [sum(sizes)] * node.comm.size)
    context.windows.append(window)
    if context.stage.gradient is Placement.SHARD:  # else they are counted as gradients
        context.memory.add("buffers", sum(sizes))
    offset = 0
    for nbytes in sizes:
        context.regions.append(Region(window, node.comm.rank, offset, node.fence))
        offset += nbytes


def assign_regions(units: Sequence[Unit], order: Sequence[Unit], context: Context) -> None:
    """Say which unit fills which region, now that units are reduced in this order.

    Args:
        units: all, the root first.
        order: those with gradients.
        context: has the regions.
    """
    if not context.regions:
        return
    if context.stage.gradient is Placement.REPLICATE:
        for unit, region in zip(units, context.regions, strict=True):
            _assign(unit, region)
        return
    own, *shared = context.regions
    _assign(units[0], own)
    for turn, unit in enumerate(unit for unit in order if unit is not units[0]):
        _assign(unit, shared[turn % len(shared)])


def _assign(unit: Unit, region: Region) -> None:
    offset = 0
    for segment in unit.trainable:
        segment.gradients.region, segment.gradients.region_offset = region, offset
        offset += _aligned_bucket_nbytes(segment)
