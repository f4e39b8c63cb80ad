"""Where the flat buffers of a partition lie: with the ranks of a node together, or with each rank."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from zerompi.collectives.buffer import SharedBuffer
from zerompi.collectives.shared import PAGE_NBYTES, SharedNode, Window, has_room
from zerompi.placement import Placement
from zerompi.regions import Region
from zerompi.segment import Context, Segment
from zerompi.unit import Unit

_TURNS = 2  # one bucket is filled while the other is read


def place(units: Sequence[Unit], context: Context) -> None:
    """Take memory for all parameters, and find places for the buckets. Collective over the world.

    With shared memory a node has one copy of the parameters, of which the parameters of all its
    ranks are views: where the ranks step shards only, and parameters are replicated or all shards
    are on the node. Buckets lie where the other ranks of the node can read them.
    """
    group = context.shard_group
    copies = [_in_pages(s) for s in _segments(units)] if _has_node_copies(context) else []
    regions = _region_sizes(units, context)
    fits = group.node is not None and has_room(sum(copies) + sum(regions) * group.node_comm.size)
    node = group.node if all(context.world.agree("place of the buffers", int(fits))) else None
    made = iter(_node_copies(node, units, copies, context) if node is not None else ())
    for unit in units:
        unit.allocate([next(made, None) for _ in unit.segments])
    if node is not None:
        _make_regions(node, units, regions, context)


def _segments(units: Sequence[Unit]) -> Iterator[Segment]:
    for unit in units:
        yield from unit.segments


def _has_node_copies(context: Context) -> bool:
    stage, topology = context.stage, context.shard_group.topology
    if stage.optimizer_state is Placement.REPLICATE:
        return False  # every rank steps, and writes, all of it
    return stage.parameter is Placement.REPLICATE or topology.is_single_node


def _in_pages(segment: Segment) -> int:
    """Bytes of a segment's parameters, rounded up so that the next one begins with a page."""
    return -(-segment.layout.padded_numel * segment.dtype.itemsize // PAGE_NBYTES) * PAGE_NBYTES


def _node_copies(
    node: SharedNode, units: Sequence[Unit], sizes: Sequence[int], context: Context
) -> list[SharedBuffer]:
    if not sum(sizes):
        return []
    window = Window(node.comm, [sum(sizes), *[0] * (node.comm.size - 1)])
    context.windows.append(window)
    buffers = []
    offset = 0
    for segment, nbytes in zip(_segments(units), sizes, strict=True):
        flat = window.parts(offset, segment.layout.padded_numel, segment.dtype)[0]
        buffers.append(SharedBuffer([flat] * node.comm.size, node.comm.rank))
        offset += nbytes
    return buffers


# -- buckets -----------------------------------------------------------------------------------


def _bucket_nbytes(unit: Unit) -> int:
    return sum(_bucket_pages(segment) for segment in unit.trainable)


def _bucket_pages(segment: Segment) -> int:
    nbytes = segment.layout.padded_numel * segment.reduce_dtype.itemsize
    return -(-nbytes // PAGE_NBYTES) * PAGE_NBYTES


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
        segment.region, segment.region_offset = region, offset
        offset += _bucket_pages(segment)
