"""All-gather and reduce-scatter whose messages are quantized (ZeRO++: qwZ and qgZ).

Wang et al., arXiv:2306.10209, sections 3.1 (block quantization of weights) and 3.3 (gradients by a
hierarchical all-to-all). A message is a *packed block*: one float32 scale for every `block` elements, then
a code of 8 or 4 bits for each (zerompi/kernels/quantization.py has the format).

What is quantized is what is sent. Inside a node with shared memory ranks read each other's values as they
are, and where no message is sent at all nothing is quantized.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zerompi import device
from zerompi.arrays import as_numpy, empty, empty_like
from zerompi.collectives.all_gather import Ranges, gather_blocks, gather_from_nodes
from zerompi.collectives.buffer import allocate
from zerompi.collectives.group import Group
from zerompi.collectives.lane import on_any_memory
from zerompi.collectives.node import Node
from zerompi.collectives.pipeline import Chunk, overlapped
from zerompi.collectives.reduce_scatter import reduce_blocks, staged_rows
from zerompi.collectives.staging import chunk_numel
from zerompi.collectives.summation import sum_in_order
from zerompi.kernels import quantization as on_host
from zerompi.kernels import quantization_on_device as on_device
from zerompi.kernels.casting import launch_cast
from zerompi.memory import DeviceArray, Flat
from zerompi.topology import Topology

QUANTIZED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_ALIGNMENT = 64  # of packed blocks in memory, in bytes
_CHUNK_NUMEL = 1 << 18  # of each block that is reduced at a time
_STAGING_NUMEL = 16 << 20  # of all blocks together


class Code(NamedTuple):
    """How numbers are packed: bits of each, and how many of them have one scale."""

    bits: int
    block: int

    def nbytes(self, numel: int) -> int:
        """Bytes of `numel` numbers that are packed together."""
        return on_host.packed_nbytes(numel, self.bits, self.block)

    def pack(self, values: Flat, packed: Flat) -> None:
        """Quantize 1-D `values` of one of QUANTIZED_DTYPES into `packed`, uint8."""
        if values.numel():
            run = on_device.launch_quantize if _is_device(values) else on_host.quantize
            run(_array(values), _array(packed), *self)

    def unpack(self, packed: Flat, out: Flat) -> None:
        """The reverse of `pack`; `out` is overwritten."""
        self.total([packed], out)

    def total(self, summands: Sequence[Flat], out: Flat) -> None:
        """`out` = the sum of packed `summands`, added in float32 from the first to the last."""
        if out.numel():
            run = on_device.launch_dequantize_sum if _is_device(out) else on_host.dequantize_sum
            run([_array(summand) for summand in summands], _array(out), *self)

    def packed_total(self, summands: Sequence[Flat]) -> Flat:
        """The same sum, packed again."""
        packed = empty_like(summands[0])
        if packed.numel():
            run = on_host.dequantize_sum_quantize
            if _is_device(packed):
                run = on_device.launch_dequantize_sum_quantize
            run([_array(summand) for summand in summands], _array(packed), *self)
        return packed

    def lost(self, values: Flat, packed: Flat, out: Flat) -> None:
        """`out` = what float32 `values` lose when they are `packed`; zero where that is not finite."""
        if values.numel():
            run = on_device.launch_quantization_error
            if not _is_device(values):
                run = on_host.quantization_error
            run(_array(values), _array(packed), _array(out), *self)


def _is_device(flat: Flat) -> bool:
    return isinstance(flat, DeviceArray)


def _array(flat: Flat) -> Any:
    """A NumPy or CuPy array over contiguous memory, which it does not keep alive; bfloat16 as uint16."""
    if isinstance(flat, DeviceArray):
        return device.as_cupy(flat)
    return as_numpy(flat)


class Packer:
    """Quantizes gradients; with error feedback it adds to them what the last time has lost.

    Args:
        code: how.
        error_feedback: whether what a quantization loses is kept, as float32, and added to what comes
            to the same place next (Seide et al., Interspeech 2014, "1-bit SGD"). What is not finite is
            not kept.

    Attributes:
        nbytes: of what is kept.
    """

    def __init__(self, code: Code, *, error_feedback: bool) -> None:
        self.code = code
        self.nbytes = 0
        self.error_feedback = error_feedback
        self._residuals: dict[tuple[int, int, int], Flat] = {}

    def pack(self, values: Flat, place: tuple[int, int, int]) -> Flat:
        """Quantize 1-D float32 `values`, which are left as they are; `place` says which they are."""
        packed = empty(values, self.code.nbytes(values.numel()), torch.uint8)
        if not self.error_feedback:
            self.code.pack(values, packed)
            return packed
        residual = self._residuals.get(place)
        if residual is None:
            residual = self._residuals[place] = _lasting(values, values.numel(), torch.float32)
            self.nbytes += residual.nbytes
        else:
            corrected = empty_like(values)
            sum_in_order([values, residual], corrected, 1.0)
            values = corrected
        self.code.pack(values, packed)
        self.code.lost(values, packed, residual)
        return packed

    def add(self, summands: Sequence[Flat], numel: int, place: tuple[int, int, int]) -> Flat:
        """The sum of packed `summands` of `numel` elements, packed again."""
        if len(summands) == 1:
            return summands[0]
        if not self.error_feedback:
            return self.code.packed_total(summands)
        total = empty(summands[0], numel, torch.float32)
        self.code.total(summands, total)
        return self.pack(total, place)

    def forget(self) -> int:
        """Let go of what was kept; return how many bytes it had."""
        self._residuals.clear()
        nbytes, self.nbytes = self.nbytes, 0
        return nbytes


def _lasting(like: Flat, numel: int, dtype: torch.dtype) -> Flat:
    """Memory of the kind of `like` that is large, or kept for long."""
    if isinstance(like, DeviceArray):
        return empty(like, numel, dtype)
    return allocate(numel, dtype)


# -- all-gather --------------------------------------------------------------------------------


@on_any_memory
def gather_blocks_quantized(
    full: Flat, ranges: Ranges, group: Group, code: Code, *, label: str = "all_gather"
) -> None:
    """Fill `full` with the quantized blocks of all ranks. Collective, unchecked.

    Every rank has the same bits afterwards: its own block is overwritten by what the others get of it.
    In a group of one rank nothing is sent, and nothing changes.

    Args:
        full: 1-D, one of QUANTIZED_DTYPES; this rank's block is in place.
        ranges: elements [start, stop) of each shard index's block; of any length, also none.
        group: the ranks.
        code: how blocks are quantized.
        label: under which the bytes are counted.
    """
    if group.size == 1:
        return
    blocks = [full[start:stop] for start, stop in ranges]
    packed, places = _packed_memory(blocks, range(group.size), code)
    own = group.topology.shard_index(group.rank)
    code.pack(blocks[own], packed[slice(*places[own])])
    gather_blocks(packed, places, group, label=label)
    for block, place in zip(blocks, places, strict=True):
        code.unpack(packed[slice(*place)], block)


def gather_node_copies_quantized(
    copies: Sequence[tuple[Tensor, Ranges]],
    group: Group,
    code: Code,
    *,
    label: str = "all_gather",
) -> None:
    """Fill what the node has one copy of with the quantized blocks of all ranks. Collective, unchecked.

    As `gather_node_copies`: each block enters each other node once, packed, and each rank unpacks, into
    the copies, the own block and those that it is the delegate for. All nodes have the same bits.

    Args:
        copies: memory that the ranks of this node share, in which each rank's own block is in place; and
            the ranges of each shard index's block.
        group: the ranks; with shared memory, on several nodes.
        code: how blocks are quantized.
        label: under which the bytes are counted.
    """
    assert group.node is not None
    topology, rank = group.topology, group.rank
    node = topology.node_of[rank]
    handled = [o for o in range(group.size) if topology.delegate(node, o) == rank]
    unpacked: list[list[Tensor]] = []
    packed: list[list[Flat]] = []
    for full, ranges in copies:
        blocks = [full[slice(*ranges[topology.shard_index(o)])] for o in range(group.size)]
        memory, places = _packed_memory(blocks, handled, code)
        unpacked.append(blocks)
        packed.append([memory[start:stop] for start, stop in places])
        code.pack(blocks[rank], packed[-1][rank])
    gather_from_nodes(packed, group, label)
    for blocks, messages in zip(unpacked, packed, strict=True):
        for owner in handled:
            code.unpack(messages[owner], blocks[owner])
    group.node.fence.cross()


def _packed_memory(
    blocks: Sequence[Flat], wanted: Iterable[int], code: Code
) -> tuple[Flat, list[tuple[int, int]]]:
    """Memory for packed blocks, and where each begins and stops in it; those not wanted have none."""
    sizes = dict.fromkeys(range(len(blocks)), 0)
    sizes.update({number: code.nbytes(blocks[number].numel()) for number in wanted})
    places, offset = [], 0
    for nbytes in sizes.values():
        places.append((offset, offset + nbytes))
        offset += -(-nbytes // _ALIGNMENT) * _ALIGNMENT
    return _lasting(blocks[0], offset, torch.uint8), places


# -- reduce-scatter ----------------------------------------------------------------------------


@on_any_memory
def reduce_blocks_quantized(
    full: Flat,
    out: Flat,
    ranges: Ranges,
    group: Group,
    packer: Packer,
    *,
    scale: float = 1.0,
    label: str = "reduce_scatter",
    peers: Sequence[Flat] | None = None,
) -> None:
    """`out` = `scale` times the sum over ranks of this rank's block, sent quantized. Collective, unchecked.

    As `reduce_blocks`, by the same ways: flat, every rank sends each block to its owner; hierarchical,
    inside the node first, then between nodes, then between groups of nodes. At each of these steps
    every summand is quantized, the one that stays on the rank, too, and the sum taken in float32; inside
    a node with shared memory the sum is that of the values themselves. On a single such node, and in a
    group of one rank, this is `reduce_blocks`.

    A summand that is not finite makes its whole block of the sum NaN.

    Args:
        full: 1-D, one of QUANTIZED_DTYPES, all blocks of this rank's summand; left as it is.
        out: as many elements as this rank's block; overwritten; may be that block itself.
        ranges: elements [start, stop) of each shard index's block.
        group: the ranks.
        packer: quantizes; has what error feedback keeps.
        scale: applied before the first quantization.
        label: under which the bytes are counted.
        peers: see `reduce_blocks`.
    """
    node, topology = group.node_of(full), group.topology
    if group.size == 1 or (node is not None and topology.is_single_node):
        reduce_blocks(full, out, ranges, group, scale=scale, label=label, peers=peers)
        return
    number = node.fence.cross() if node is not None and peers is not None else None
    blocks = [slice(*ranges[topology.shard_index(owner)]) for owner in range(group.size)]
    rows = [[memory[block] for block in blocks] for memory in (peers or [full])]
    longest = max(block.stop - block.start for block in blocks)
    # Chunks of whole blocks and bytes: together they are packed as all at once would be.
    whole = 2 * packer.code.block
    chunk = max(1, min(_CHUNK_NUMEL, _STAGING_NUMEL // group.size) // whole) * whole
    steps = _steps(topology, group.rank, group.algorithm == "flat", node is not None)

    def reduced(start: int) -> Chunk:
        target = out[start : start + chunk]
        parts = [[block[start : start + chunk] for block in row] for row in rows]
        if node is None:
            summands = {o: _scaled(part, scale) for o, part in enumerate(parts[0])}
        else:
            staging = node if peers is None else None
            summands = _sums_in_node(parts, staging, group, scale, label)
        return _sum_by_steps(summands, target, steps, group, packer, start, label)

    overlapped(reduced(start) for start in range(0, longest, chunk))
    if node is not None and number is not None:
        node.fence.finish(number)


def _scaled(values: Flat, scale: float) -> Flat:
    """`scale` times the values in float32; perhaps the same memory."""
    wide = _widened(values)
    if scale == 1.0:
        return wide
    out = empty_like(wide)
    sum_in_order([wide], out, scale)
    return out


def _widened(values: Flat) -> Flat:
    """The values in float32; the same memory if they are."""
    if isinstance(values, Tensor):
        return values.to(torch.float32)
    if values.dtype is torch.float32:
        return values
    wide = device.empty(values, values.numel(), torch.float32)
    launch_cast(_array(values), _array(wide))
    return wide


def _sums_in_node(
    rows: Sequence[Sequence[Flat]], staging: Node | None, group: Group, scale: float, label: str
) -> dict[int, Flat]:
    """Of each owner that this rank is the delegate for, `scale` times the sum of this node; float32.

    Args:
        rows: of each rank of the node, its part of each owner's block, if the ranks can read each
            other's; else of this rank only.
        staging: through which the rows of this rank pass then, else None.
        group: the ranks; some of them on one node.
        scale: applied in the accumulator.
        label: under which the bytes are counted.
    """
    topology, rank = group.topology, group.rank
    number = topology.node_of[rank]
    mine = [owner for owner in range(group.size) if topology.delegate(number, owner) == rank]
    sums = {owner: empty_like(rows[0][owner]) for owner in mine}
    longest = max(part.numel() for part in rows[0])
    size = longest if staging is None else chunk_numel(group.size, rows[0][0].dtype)
    for start in range(0, longest, size or 1):
        parts = [[part[start : start + size] for part in row] for row in rows]
        if staging is not None:
            parts = staged_rows(staging, parts[0], group)
        for owner in mine:
            summands = [row[owner] for row in parts]
            sum_in_order(summands, sums[owner][start : start + size], scale)
            group.count_shared(label, (len(summands) - 1) * summands[0].nbytes)
    return {owner: _widened(total) for owner, total in sums.items()}


class _Step(NamedTuple):
    """One exchange of summands.

    Attributes:
        collector: of each owner whose summand this rank has, who gets it.
        sources: of each owner that this rank collects for, who has summands, in the order of the sum.
    """

    collector: Mapping[int, int]
    sources: Mapping[int, Sequence[int]]


@lru_cache(maxsize=64)
def _steps(topology: Topology, rank: int, is_flat: bool, is_shared: bool) -> list[_Step]:
    """The exchanges of a reduce-scatter on this rank."""
    owners = range(topology.size)
    if is_flat and not is_shared:
        return [_Step({o: o for o in owners}, {rank: owners})]
    node, group = topology.node_of[rank], topology.group_of(rank)
    delegates = {o: topology.delegate(node, o) for o in owners}
    mine = [o for o in owners if delegates[o] == rank]
    steps = []
    if not is_shared:
        steps.append(_Step(delegates, dict.fromkeys(mine, topology.ranks_of_node[node])))
    nodes = topology.nodes_of_group[group]
    collectors = {o: topology.group_delegate(group, o) for o in mine}
    collected = [o for o in mine if collectors[o] == rank]
    sources = {o: [topology.delegate(n, o) for n in nodes] for o in collected}
    steps.append(_Step(collectors, sources))
    if topology.num_groups > 1:
        holders = [topology.group_delegate(g, rank) for g in range(topology.num_groups)]
        steps.append(_Step({o: o for o in collected}, {rank: holders}))
    return steps


def _sum_by_steps(
    summands: Mapping[int, Flat],
    out: Flat,
    steps: Sequence[_Step],
    group: Group,
    packer: Packer,
    start: int,
    label: str,
) -> Chunk:
    """Sum what the ranks have of one chunk of every block, exchange by exchange.

    Args:
        summands: of each owner, float32, what this rank has.
        out: this rank's part of the sum.
        steps: the exchanges.
        group: the ranks.
        packer: quantizes.
        start: where in its block the chunk begins.
        label: under which the bytes are counted.
    """
    rank = group.rank
    numels = {owner: part.numel() for owner, part in summands.items()}
    packed = {owner: packer.pack(part, (0, owner, start)) for owner, part in summands.items()}
    for level, step in enumerate(steps, start=1):
        received = _received(packed, step, rank)
        finish = group.start_exchange(
            [(peer, packed[owner]) for owner, peer in step.collector.items() if peer != rank],
            [
                (source, part)
                for owner, sources in step.sources.items()
                for source, part in zip(sources, received[owner], strict=True)
                if source != rank
            ],
            label,
        )
        yield
        finish()
        if level == len(steps):
            packer.code.total(received[rank], out)
        else:
            packed = {
                owner: packer.add(parts, numels[owner], (level, owner, start))
                for owner, parts in received.items()
            }


def _received(packed: Mapping[int, Flat], step: _Step, rank: int) -> dict[int, list[Flat]]:
    """By owner, memory for all that this rank collects; the rank's own summand is in place."""
    return {
        owner: [packed[owner] if s == rank else empty_like(packed[owner]) for s in sources]
        for owner, sources in step.sources.items()
    }
