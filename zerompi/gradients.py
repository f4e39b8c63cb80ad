"""Gradients of a segment: collected in a bucket, reduced, and lent to the optimizer's pieces.

Nothing here knows when a step happens: hooks.py does.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from zerompi.collectives.all_reduce import reduce_all
from zerompi.collectives.buffer import Buffer, lend
from zerompi.collectives.quantized import reduce_blocks_quantized
from zerompi.collectives.reduce_scatter import reduce_blocks
from zerompi.errors import ZerompiError
from zerompi.layout import FlatLayout
from zerompi.placeholder import placeholder
from zerompi.placement import Placement
from zerompi.regions import ALIGNMENT, Region, Settling

if TYPE_CHECKING:
    from zerompi.segment import Segment


class Gradients:
    """The gradients of one segment, from autograd to the pieces of the optimizer.

    Args:
        segment: whose parameters they belong to.

    Attributes:
        owner: the unit, which has the region while the bucket lies there.
        dtype: in which they are collected and reduced.
        bucket: this rank's sum of gradients, (padded_numel,), reduce dtype, or None.
        region: where a bucket lies that the other ranks of the node can read, or None.
        home: what the last reduced gradients lie in; used again when nobody has them any more.
        packer: quantizes the gradients when they are reduced, or None.
        present: per parameter, whether the bucket holds a gradient for it.
        collected: gradients collected in the running backward pass.
        expected: how many a pass is expected to bring: as many parameters as had a gradient on any
            rank at the last reduction.
    """

    def __init__(self, segment: Segment) -> None:
        self.owner: Settling
        self._segment = segment
        self._context = context = segment.context
        precision, quantize = context.precision, context.quantize
        self.dtype = segment.main_dtype
        if segment.is_mixed and precision.reduce_dtype is not None:
            self.dtype = precision.reduce_dtype
        self.packer = quantize.gradient_packer(self.dtype) if quantize else None
        self.bucket: Buffer | None = None
        self.present = [False] * len(segment.parameters)
        self.collected = 0
        self.expected = len(segment.parameters)
        self.reduced: Tensor | None = None
        self.region: Region | None = None
        self.region_offset = 0
        self.home: Buffer | None = None
        self._handed_out: list[weakref.ref[object]] = []
        self._lent: dict[int, weakref.ref[Tensor]] = {}

    def lend(self, index: int) -> Tensor | None:
        """Where in the bucket the gradient of parameter `index` will lie, for who makes it; or None.

        It is None if something is there already, or at an address where sums come out otherwise than
        in new memory. Until it is collected, whoever has the tensor may find it moved elsewhere.
        """
        self.owner.settle()  # a reduction that reads the bucket
        if self.present[index] or index in self._lent:
            return None
        slot = self._slot(index)
        if slot.data_ptr() % ALIGNMENT:
            return None
        self._lent[index] = weakref.ref(slot)
        return slot

    def take_back(self) -> None:
        """Move gradients that are made, but not collected yet, out of the bucket: it is wanted now.

        Autograd has them where it waits for another part of their sum.
        """
        for index in list(self._lent):
            self._take_back(index)

    def _take_back(self, index: int) -> None:
        gradient = self._lent.pop(index)()
        if gradient is not None:
            gradient.data = gradient.clone()

    def collect(self, index: int, weight: float) -> None:
        """Move the gradient that autograd has accumulated for parameter `index` into the bucket.

        If that is where it was made (`lend`), nothing moves. It counts `weight` times there; with 0 not
        at all, whatever it is.
        """
        segment = self._segment
        parameter = segment.parameters[index]
        gradient = parameter.grad
        if gradient is None:
            return
        parameter.grad = None
        if gradient.requires_grad:
            raise ZerompiError(
                f"{segment.names[index]}: backward(create_graph=True) would need a graph through the "
                "gradient reduction; use torch.autograd.grad(..., create_graph=True) for the inner "
                "derivative and a plain backward() for the outer one"
            )
        if gradient.layout is not torch.strided:
            raise ZerompiError(
                f"{segment.names[index]}: expected a dense gradient, got {gradient.layout}; build the "
                "embedding with sparse=False"
            )
        self.collected += 1
        slot = self._slot(index)
        is_there = False
        if index in self._lent:
            is_there = gradient.data_ptr() == slot.data_ptr()
            if is_there:
                del self._lent[index]
            else:
                self._take_back(index)
        if self.present[index]:
            if weight:
                slot.add_(gradient, alpha=weight)
            return
        self.present[index] = True
        if not weight:
            slot.zero_()
            return
        if not is_there:
            slot.copy_(gradient)
        if weight != 1.0:
            slot.mul_(weight)

    def _slot(self, index: int) -> Tensor:
        """Where the gradient of parameter `index` lies in the bucket."""
        if self.bucket is None and self.region is not None:
            self.region.claim(self.owner)
        return self._segment.view(self._bucket().tensor, index)

    def _bucket(self) -> Buffer:
        if self.bucket is None:
            self.bucket = self._make_bucket()
            passing = self._context.stage.gradient is Placement.SHARD
            if passing and self.bucket.peers is None:
                self._context.memory.add("buffers", self.bucket.nbytes)
        return self.bucket

    def _make_bucket(self) -> Buffer:
        """Memory for a bucket: if possible where the node's other ranks can read it."""
        is_free = self._is_home_free()
        if is_free:
            self.reduced = None
        numel, dtype = self._segment.layout.padded_numel, self.dtype
        if self._context.stage.gradient is Placement.SHARD:
            if self.region is not None and self.region.user is self.owner:
                return self.region.buffer(self.region_offset, numel, dtype)
        elif is_free and self.home is not None:
            return self.home
        elif is_free and self.region is not None:
            return self.region.buffer(self.region_offset, numel, dtype)
        return Buffer(self._context.shard_group.allocate(numel, dtype))

    def discard(self) -> None:
        """Forget what is in the bucket."""
        is_private = self.bucket is not None and self.bucket.peers is None
        if self.bucket and is_private and self._context.stage.gradient is Placement.SHARD:
            self._context.memory.add("buffers", -self.bucket.nbytes)
        self.bucket = None
        self.present = [False] * len(self._segment.parameters)
        self._lent.clear()

    def is_readable(self) -> bool:
        """Whether the node's other ranks can read the bucket, or can if one is made for this reduction."""
        if self.bucket is not None:
            return self.bucket.peers is not None
        if self._context.stage.gradient is Placement.REPLICATE:
            if not self._is_home_free():
                return False
            if self.home is not None:
                return self.home.peers is not None
        if self.region is None:
            return False
        self.region.claim(self.owner)
        return self.region.user is self.owner

    def reduce(self, used: Sequence[bool], scale: float, *, in_place: bool) -> None:
        """Reduce the bucket to `scale` times the sum over all ranks and install the gradients.

        Collective. `used` says for each parameter whether any rank has a gradient for it; the
        others keep the gradient that they have (None, usually). `in_place`: all ranks of the node
        have buckets that the others can read.
        """
        segment = self._segment
        bucket = self._bucket()
        flat = bucket.tensor
        if False in self.present:
            for i, present in enumerate(self.present):
                if not present:
                    segment.view(flat, i).zero_()
        peers = bucket.peers if in_place else None
        ranges, stage = segment.layout.shard_ranges, self._context.stage
        group, replicas = self._context.shard_group, self._context.replica_group
        home = bucket
        if stage.optimizer_state is Placement.REPLICATE:
            reduce_all(flat, ranges, group, scale=scale, peers=peers)
            result = flat
        else:
            if stage.gradient is Placement.REPLICATE:
                base = segment.shard_index * segment.layout.shard_numel
                result = flat[base : base + segment.layout.shard_numel]
            else:
                home = self._make_shard()
                result = home.tensor
            exact = result[: segment.own.numel]
            self._reduce_blocks(flat, exact, scale, peers)
            if replicas is not None:
                parts = FlatLayout([(exact.numel(),)], replicas.size).shard_ranges
                reduce_all(exact, parts, replicas, scale=1.0)
        if not self._is_added_to():
            self.home = home
        self.discard()
        self.expected = sum(used)
        self._install(result, used)

    def _reduce_blocks(
        self, flat: Tensor, own: Tensor, scale: float, peers: Sequence[Tensor] | None
    ) -> None:
        """`own` = `scale` times this rank's block of the sum of `flat` over the shard group. Collective."""
        ranges, group = self._segment.layout.shard_ranges, self._context.shard_group
        if self.packer is None:
            reduce_blocks(flat, own, ranges, group, scale=scale, peers=peers)
            return
        kept = self.packer.nbytes
        reduce_blocks_quantized(flat, own, ranges, group, self.packer, scale=scale, peers=peers)
        self._context.memory.add("buffers", self.packer.nbytes - kept)

    def forget_residuals(self) -> None:
        """Let go of what error feedback has kept of gradients: the weights are others now."""
        if self.packer is not None:
            self._context.memory.add("buffers", -self.packer.forget())

    def _make_shard(self) -> Buffer:
        """Memory for a reduced gradient, (shard_numel,): the last one's, if nobody has that any more."""
        if self.home is not None and self._is_home_free():
            return self.home
        numel = self._segment.layout.shard_numel
        return Buffer(self._context.shard_group.allocate(numel, self.dtype))

    def _is_home_free(self) -> bool:
        """Whether nobody has the last reduced gradients any more: `zero_grad` has been called."""
        for memory in self._handed_out:
            if memory() is not None:
                return False
        return not self._is_added_to()

    def _is_added_to(self) -> bool:
        """Whether the next gradient will be added to one that a piece still has."""
        return any([piece.grad is not None for piece in self._segment.pieces])  # noqa: C419 (takes half the time)

    def _install(self, result: Tensor, used: Sequence[bool]) -> None:
        """Make `result` the pieces' gradient, adding where `zero_grad` has not been called.

        Where the reduce dtype is not the main dtype, `.grad` is a marker (NaN, no memory) until
        `cast`: so `zero_grad` of both kinds is seen, and the gradient takes the reduce
        dtype's memory only.
        """
        segment = self._segment
        if self.dtype is segment.main_dtype:
            lent, handed_out = lend(result)
            for i, piece in enumerate(segment.pieces):
                if used[i]:
                    part = segment.part(lent, i)
                    piece.grad = part if piece.grad is None else piece.grad.add_(part)
            self._handed_out = [ref for ref in self._handed_out if ref() is not None]
            if handed_out is not None:
                self._handed_out.append(handed_out)
            return
        if self.reduced is not None and self._is_added_to():
            for i, is_marker in enumerate(_find_markers(segment.pieces)):
                if used[i]:
                    kept = segment.part(self.reduced, i)
                    kept.copy_(segment.part(result, i) + (kept if is_marker else 0))
        else:
            self.reduced = result
        for i, piece in enumerate(segment.pieces):
            if used[i]:
                piece.grad = placeholder(piece, segment.main_dtype)

    @property
    def is_deferred(self) -> bool:
        """Whether the pieces' gradients wait in the reduce dtype, until `cast`."""
        return self.dtype is not self._segment.main_dtype and self.reduced is not None

    def leave_shared_memory(self) -> None:
        """Give the pieces' gradients memory of this rank's own where they have had the node's."""
        self.bucket = self.region = self.reduced = None
        if self.home is not None and self.home.peers is not None:
            self.home = None
            for piece in self._segment.pieces:
                if piece.grad is not None and self.dtype is self._segment.main_dtype:
                    piece.grad = piece.grad.clone()

    @property
    def nbytes(self) -> int:
        """Bytes that hold gradients for longer than a moment."""
        held = [] if self.home is None else [self.home]
        if self._context.stage.gradient is Placement.REPLICATE and self.bucket is not None:
            held.append(self.bucket)
        return sum(buffer.nbytes for buffer in {id(buffer): buffer for buffer in held}.values())


def named(segments: Sequence[Segment]) -> Iterator[tuple[str, Tensor]]:
    """The reduced gradients that this rank holds, in the reduce dtype, each with its parameter's name.

    The host waits for a device once at most.
    """
    are_markers = iter(_markers_of(segments))
    for segment in segments:
        reduced = segment.gradients.reduced
        for i, (name, piece) in enumerate(zip(segment.names, segment.pieces, strict=True)):
            if not segment.gradients.is_deferred:
                if piece.grad is not None:
                    yield name, piece.grad
            elif next(are_markers):
                assert reduced is not None
                yield name, segment.part(reduced, i)


@contextmanager
def cast(segments: Sequence[Segment]) -> Iterator[None]:
    """While the context lasts, `.grad` of the pieces is the gradient in the main dtype."""
    are_markers = iter(_markers_of(segments))
    pieces = []
    for segment in segments:
        if not segment.gradients.is_deferred:
            continue
        reduced = segment.gradients.reduced
        assert reduced is not None
        wide = segment.context.shard_group.allocate(reduced.numel(), segment.main_dtype)
        wide.copy_(reduced)
        for i, piece in enumerate(segment.pieces):
            if next(are_markers):
                piece.grad = segment.part(wide, i)
                pieces.append(piece)
    try:
        yield
    finally:
        for piece in pieces:
            piece.grad = placeholder(piece, piece.dtype)


def _markers_of(segments: Sequence[Segment]) -> list[bool]:
    """`_find_markers` of all pieces of the segments whose gradients are deferred."""
    deferred = [segment for segment in segments if segment.gradients.is_deferred]
    return _find_markers([piece for segment in deferred for piece in segment.pieces])


def _find_markers(pieces: Sequence[nn.Parameter]) -> list[bool]:
    """Which pieces' gradients wait in the reduce dtype: `zero_grad(set_to_none=False)` zeroes the NaN.

    The host waits for a device once, for all.
    """
    gradients = [piece.grad for piece in pieces]
    firsts = [g.as_strided((1,), (1,)) for g in gradients if g is not None and g.numel()]
    are_nan = iter(torch.cat(firsts).isnan().tolist() if firsts else ())
    return [g is not None and (not g.numel() or next(are_nan)) for g in gradients]
