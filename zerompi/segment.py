"""Segments: the tensors of docs/data-way.md and the steps between them.

A *segment* is the parameters of one unit that share a dtype and the need of a gradient; it owns the
flat buffers. Nothing here knows when a step happens: hooks.py does.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from zerompi.attendance import Attendance
from zerompi.collectives.all_gather import gather_blocks, gather_node_copies
from zerompi.collectives.all_reduce import reduce_all
from zerompi.collectives.broadcast import broadcast
from zerompi.collectives.buffer import Buffer, lend
from zerompi.collectives.group import Group
from zerompi.collectives.quantized import reduce_blocks_quantized
from zerompi.collectives.reduce_scatter import reduce_blocks
from zerompi.collectives.shared import Window
from zerompi.comm_thread import CommThread
from zerompi.errors import ZerompiError
from zerompi.layout import FlatLayout, Range
from zerompi.placement import Placement, Stage
from zerompi.precision import MixedPrecision, NonFinite
from zerompi.quantize import Quantize
from zerompi.regions import Region, Settling, Slot
from zerompi.report import MemoryLedger, PhaseTimes


@dataclass
class Context:
    """What all units of one partition share.

    `world` is every rank of the partition. The ranks of `shard_group` hold one copy of the sharded
    state together; `replica_group` joins the ranks that hold the same shard (None: there is one
    copy). The ranks of `node_group` keep what was gathered together, until the parameters change
    (None: nobody keeps it). `is_single_node` tells whether every shard group is on one node.
    `quantize` says which messages are quantized (None: none).

    Attributes:
        windows: shared memory of the partition, to be freed with it.
        regions: where buckets lie.
        slots: where gathered parameters lie, for each depth at which units enclose each other.
        ahead: what was gathered before anybody needed it.
        is_shared: whether the full parameters, while they are there, are there once for a node.
        nonfinite: what a step does whose gradient is not finite.
        refreshes_ahead: whether a unit waits for its refresh where it is used, not where it is stepped.
        attendance: which ranks take part, inside `join`.
    """

    stage: Stage
    world: Group
    shard_group: Group
    replica_group: Group | None
    node_group: Group | None
    is_single_node: bool
    precision: MixedPrecision
    quantize: Quantize | None
    thread: CommThread
    windows: list[Window] = field(default_factory=list)
    regions: list[Region] = field(default_factory=list)
    slots: list[list[Slot]] = field(default_factory=list)
    ahead: list[Settling] = field(default_factory=list)
    is_shared: bool = False
    memory: MemoryLedger = field(default_factory=MemoryLedger)
    times: PhaseTimes = field(default_factory=PhaseTimes)
    nonfinite: NonFinite = "raise"
    refreshes_ahead: bool = False
    attendance: Attendance = field(init=False)

    def __post_init__(self) -> None:
        """Let all ranks take part."""
        self.attendance = Attendance(self.world)

    def settle(self) -> None:
        """Let go of what was gathered ahead, and wait for all communication that was started."""
        while self.ahead:
            self.ahead.pop().settle()
        self.thread.drain()

    def free_slots(self) -> None:
        """Give back the memory of slots that this rank has for itself and does not use now."""
        for slots in self.slots:
            for slot in slots:
                self.memory.add("buffers", -slot.free())


def placeholder(tensor: Tensor, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """One element expanded to the shape of `tensor`: no memory, and NaN when it is read.

    On the tensor's device, or another one.
    """
    device = device or tensor.device
    if dtype.is_floating_point or dtype.is_complex:
        value = torch.full((), float("nan"), dtype=dtype, device=device)
    else:
        value = torch.zeros((), dtype=dtype, device=device)
    return value.expand(tensor.shape)


def _is_marker(gradient: Tensor | None) -> bool:
    """Whether a gradient waits in the reduce dtype: `zero_grad(set_to_none=False)` zeroes the NaN."""
    if gradient is None:
        return False
    return not gradient.numel() or bool(gradient.as_strided((1,), (1,)).isnan())


class Segment:
    """Parameters of one unit with the same dtype and the same need of a gradient.

    Args:
        members: (name, parameter) pairs; `parameter.data` is replaced by views of our buffers.
        context: shared by all segments of the partition.

    Attributes:
        full: flat parameters, (padded_numel,), parameter dtype: one for all ranks of the node, or
            this rank's own. Where parameters are sharded, None between uses.
        is_node_copy: whether `full` is there always, once for all ranks of the node.
        secondary: with `node_cache` and without shared memory, this rank's part of what its node
            keeps of `full`; else None.
        is_cached: whether the node has kept `full` since the parameters changed last.
        shard: own block of the flat parameters, (shard_numel,), parameter dtype.
        main: what the optimizer steps; (padded_numel,) or (shard_numel,), main dtype.
        pieces: per parameter, the view of `main` that stands in the optimizer: the whole parameter
            where optimizer states are replicated, else a 1-D piece, perhaps empty.
        bucket: this rank's sum of gradients, (padded_numel,), reduce dtype, or None.
        region: where a bucket lies that the other ranks of the node can read, or None.
        home: what the last reduced gradients lie in; used again when nobody has them any more.
        weight_code: how the parameters are quantized when they are gathered, or None.
        packer: quantizes the gradients when they are reduced, or None.
        present: per parameter, whether the bucket holds a gradient for it.
        collected: gradients collected in the running backward pass.
        expected: how many a pass is expected to bring: as many parameters as had a gradient on any
            rank at the last reduction.
    """

    def __init__(self, members: Sequence[tuple[str, nn.Parameter]], context: Context) -> None:
        self.owner: Settling
        self.names = [name for name, _ in members]
        self.parameters = [parameter for _, parameter in members]
        self.context = context
        group, precision = context.shard_group, context.precision
        first = self.parameters[0]
        self.trainable = first.requires_grad
        self.index_of = {id(parameter): i for i, parameter in enumerate(self.parameters)}
        self.layout = FlatLayout([p.shape for p in self.parameters], group.size)
        self.shard_index = group.topology.shard_index(group.rank)
        self.own = self.layout.shard_ranges[self.shard_index]

        mixed = precision.param_dtype is not None and first.is_floating_point()
        self.dtype = precision.param_dtype or first.dtype if mixed else first.dtype
        self.main_dtype = torch.float32 if mixed and self.trainable else self.dtype
        self.reduce_dtype = self.main_dtype
        if mixed and precision.reduce_dtype is not None:
            self.reduce_dtype = precision.reduce_dtype
        quantize = context.quantize
        self.weight_code = quantize.weight_code(self.dtype) if quantize else None
        self.packer = quantize.gradient_packer(self.reduce_dtype) if quantize else None

        self.full: Tensor | None = None
        self.is_node_copy = False
        self.secondary: Tensor | None = None
        self.is_cached = False
        self.bucket: Buffer | None = None
        self.present = [False] * len(self.parameters)
        self.collected = 0
        self.expected = len(self.parameters)
        self.reduced: Tensor | None = None
        self.region: Region | None = None
        self.region_offset = 0
        self.home: Buffer | None = None
        self._handed_out: list[weakref.ref[object]] = []
        self._versions: list[int] = []

    def allocate(self, node_copy: Tensor | None) -> None:
        """Take memory for the parameters; `node_copy` if the node has one for all its ranks."""
        group, stage = self.context.shard_group, self.context.stage
        self.is_node_copy = node_copy is not None
        if self.is_resident:
            if node_copy is None:
                node_copy = group.allocate(self.layout.padded_numel, self.dtype)
            base = self.shard_index * self.layout.shard_numel
            self.full = node_copy
            self.shard = self.full[base : base + self.layout.shard_numel]
        else:
            self.shard = group.allocate(self.layout.shard_numel, self.dtype)
        self.main = self._make_main(stage.optimizer_state)
        self.pieces = [
            nn.Parameter(self._part(self.main, i), requires_grad=self.trainable)
            for i in range(len(self.parameters))
        ]

    @property
    def is_resident(self) -> bool:
        """Whether the full parameters are always there."""
        return self.is_node_copy or self.context.stage.parameter is Placement.REPLICATE

    @property
    def parameter_nbytes(self) -> int:
        """Bytes of parameters that are always there; of a node's copy, this rank's share."""
        if self.is_node_copy:
            return self.full_nbytes // self.context.shard_group.node_comm.size
        kept = 0 if self.secondary is None else self.secondary.nbytes
        return self.full_nbytes if self.is_resident else self.shard.nbytes + kept

    @property
    def full_nbytes(self) -> int:
        """Bytes of the full parameters."""
        return self.layout.padded_numel * self.dtype.itemsize

    @property
    def is_main_replicated(self) -> bool:
        """Whether every rank holds all main weights."""
        return self.context.stage.optimizer_state is Placement.REPLICATE

    def _make_main(self, placement: Placement) -> Tensor:
        same = self.shard
        if placement is Placement.REPLICATE:
            assert self.full is not None
            same = self.full
        if self.main_dtype is self.dtype:
            return same
        return self._zeros(same.numel())

    def zeros_like_full(self) -> Tensor:
        """Zeros for all main weights, (padded_numel,), main dtype; a new tensor."""
        return self._zeros(self.layout.padded_numel)

    def _zeros(self, numel: int) -> Tensor:
        return self.context.shard_group.allocate(numel, self.main_dtype).zero_()

    def _part(self, flat: Tensor, index: int) -> Tensor:
        """The view of parameter `index` in a tensor placed like the optimizer states."""
        if self.is_main_replicated:
            start, stop = self.layout.parameter_ranges[index]
            return flat[start:stop].view(self.layout.shapes[index])
        start, stop = self.layout.piece(index, self.shard_index).in_shard
        return flat[start:stop]

    def view(self, flat: Tensor, index: int) -> Tensor:
        """Parameter `index` with its own shape in a full flat tensor."""
        start, stop = self.layout.parameter_ranges[index]
        return flat[start:stop].view(self.layout.shapes[index])

    # -- values in and out ---------------------------------------------------------------------

    def adopt(self) -> None:
        """Start from rank 0's parameter values, leaving placeholders. Collective over the world."""
        values = self.zeros_like_full()
        for i, parameter in enumerate(self.parameters):
            self.view(values, i).copy_(parameter.detach())
            parameter.data = placeholder(parameter, self.dtype)
        self.set_values(values)
        if self.is_resident:
            self.install()

    def set_values(self, values: Tensor) -> None:
        """Take rank 0's `values`, (padded_numel,), main dtype, as the parameters. Collective.

        `values` is overwritten on the other ranks. Where the full parameters are resident, they are
        written; where not, only the shard is.
        """
        exact = values[: self.layout.numel]
        broadcast(exact, exact, self.context.world)
        own = values[self.own.start : self.own.stop]
        self.is_cached = False
        self.forget_residuals()
        if self.is_node_copy:
            self._set_node_copy(values)
        else:
            self.shard[: self.own.numel].copy_(own)
            if self.full is not None:
                self.context.shard_group.fence()  # nobody reads any more
                self.full.copy_(values)  # perhaps together with others, who write the same
                self.context.shard_group.fence()
        if self.is_main_replicated:
            self.main.copy_(values)
        else:
            self.main[: self.own.numel].copy_(own)

    def _set_node_copy(self, values: Tensor) -> None:
        """Write the node's copy, each rank what it is the delegate for. Collective over the node."""
        group, full = self.context.shard_group, self.full
        assert full is not None
        topology, node = group.topology, group.topology.node_of[group.rank]
        group.fence()  # nobody reads any more
        for owner in range(group.size):
            if topology.delegate(node, owner) == group.rank:
                start, stop = self.layout.shard_ranges[topology.shard_index(owner)]
                full[start:stop].copy_(values[start:stop])
        group.fence()

    def main_values(self) -> Tensor:
        """The full main weights, (padded_numel,), main dtype; a new tensor. Collective."""
        if self.is_main_replicated:
            return self.main.clone()
        values = self.zeros_like_full()
        values[self.own.start : self.own.stop].copy_(self.main[: self.own.numel])
        gather_blocks(values, self.layout.shard_ranges, self.context.shard_group, label="gathered")
        return values

    def own_values(self, index: int) -> tuple[Range, Tensor]:
        """The part of parameter `index` that this rank answers for: its range and main weights."""
        piece = self.layout.piece(index, self.shard_index)
        if self.is_main_replicated:
            return piece.in_parameter, self.main[piece.in_flat.start : piece.in_flat.stop]
        return piece.in_parameter, self.main[piece.in_shard.start : piece.in_shard.stop]

    # -- parameters ----------------------------------------------------------------------------

    def install(self, flat: Tensor | None = None) -> None:
        """Make the parameters views of `flat`, (padded_numel,); None is `full`."""
        flat = self.full if flat is None else flat
        assert flat is not None
        for i, parameter in enumerate(self.parameters):
            parameter.data = self.view(flat, i)
        self._versions = [parameter._version for parameter in self.parameters]

    def changed(self) -> str | None:
        """The name of a parameter in a node's copy that somebody has changed in place, if any.

        What all ranks of the node do to it would be done several times.
        """
        if self.is_node_copy:
            for i, parameter in enumerate(self.parameters):
                if parameter._version != self._versions[i]:
                    return self.names[i]
        return None

    def replaced(self, *, visible: bool) -> str | None:
        """The name of a parameter that is not as we left it, if any: somebody has set its data.

        Args:
            visible: whether the parameters are views of `full` now, or placeholders.
        """
        nbytes, base = self.dtype.itemsize, 0
        if visible and self.full is not None:
            nbytes, base = self.full.untyped_storage().nbytes(), self.full.data_ptr()
        for i, (name, parameter) in enumerate(zip(self.names, self.parameters, strict=True)):
            if parameter.dtype is not self.dtype:
                return name
            if parameter.untyped_storage().nbytes() != nbytes:
                return name
            offset = self.layout.parameter_ranges[i].start * self.dtype.itemsize
            if visible and parameter.numel() and parameter.data_ptr() != base + offset:
                return name
        return None

    def receive(self, full: Tensor) -> None:
        """Let `full`, (padded_numel,), be the full parameters: the own block in place, the rest to come."""
        full[self.own.start : self.own.stop].copy_(self.shard[: self.own.numel])
        self.full = full

    @property
    def node_ranges(self) -> Sequence[Range]:
        """Which part of `full` each rank of the node keeps in `secondary`."""
        assert self.context.node_group is not None
        return FlatLayout([(self.layout.padded_numel,)], self.context.node_group.size).shard_ranges

    def allocate_secondary(self) -> None:
        """Take memory for this rank's part of what the node keeps."""
        assert self.context.node_group is not None
        start, stop = self.node_ranges[self.context.node_group.rank]
        self.secondary = self.context.node_group.allocate(stop - start, self.dtype)

    def keep(self) -> None:
        """Note that the node keeps `full`; without shared memory, copy this rank's part of it."""
        if self.secondary is not None and self.full is not None and not self.is_cached:
            assert self.context.node_group is not None
            start, stop = self.node_ranges[self.context.node_group.rank]
            self.secondary.copy_(self.full[start:stop])
        self.is_cached = True

    def recall(self, full: Tensor) -> None:
        """Put what this rank has kept into `full`."""
        assert self.secondary is not None
        assert self.context.node_group is not None
        start, stop = self.node_ranges[self.context.node_group.rank]
        full[start:stop].copy_(self.secondary)

    def covers(self, tensor: Tensor) -> bool:
        """Whether `tensor` lies in the full parameters that are here now."""
        if self.full is None:
            return False
        return 0 <= tensor.data_ptr() - self.full.data_ptr() < self.full_nbytes

    def hide(self) -> None:
        """Leave placeholders where the parameters' values were."""
        for parameter in self.parameters:
            parameter.data = placeholder(parameter, self.dtype)

    @property
    def refresh_gathers(self) -> bool:
        """Whether `refresh` moves what other ranks have stepped."""
        if self.is_main_replicated or not self.is_resident:
            return False
        return not (self.is_node_copy and self.context.is_single_node)

    def refresh(self) -> None:
        """Bring the parameters up to date with the main weights.

        Collective over the shard group if `refresh_gathers`. Nobody may read the parameters of a
        node's copy meanwhile; nor, if nothing is gathered, before the next fence.
        """
        if self.is_main_replicated:
            if self.main_dtype is not self.dtype:
                assert self.full is not None
                self.full.copy_(self.main)
            return
        if self.main_dtype is not self.dtype:
            self.shard.copy_(self.main)
        self.is_cached = False
        if self.refresh_gathers:
            assert self.full is not None
            ranges, group = self.layout.shard_ranges, self.context.shard_group
            if self.is_node_copy:
                gather_node_copies([(self.full, ranges)], group, label="refresh")
            else:
                gather_blocks(self.full, ranges, group, label="refresh")

    # -- gradients -----------------------------------------------------------------------------

    def collect(self, index: int, weight: float) -> None:
        """Move the gradient that autograd has accumulated for parameter `index` into the bucket.

        It counts `weight` times there; with 0 not at all, whatever it is.
        """
        parameter = self.parameters[index]
        gradient = parameter.grad
        if gradient is None:
            return
        parameter.grad = None
        if gradient.requires_grad:
            raise ZerompiError(
                f"{self.names[index]}: backward(create_graph=True) would need a graph through the "
                "gradient reduction; use torch.autograd.grad(..., create_graph=True) for the inner "
                "derivative and a plain backward() for the outer one"
            )
        if gradient.layout is not torch.strided:
            raise ZerompiError(
                f"{self.names[index]}: expected a dense gradient, got {gradient.layout}; build the "
                "embedding with sparse=False"
            )
        self.collected += 1
        if self.bucket is None and self.region is not None:
            self.region.claim(self.owner)
        slot = self.view(self._bucket().tensor, index)
        if self.present[index]:
            if weight:
                slot.add_(gradient, alpha=weight)
            return
        self.present[index] = True
        if not weight:
            slot.zero_()
            return
        slot.copy_(gradient)
        if weight != 1.0:
            slot.mul_(weight)

    def _bucket(self) -> Buffer:
        if self.bucket is None:
            self.bucket = self._make_bucket()
            passing = self.context.stage.gradient is Placement.SHARD
            if passing and self.bucket.peers is None:
                self.context.memory.add("buffers", self.bucket.nbytes)
        return self.bucket

    def _make_bucket(self) -> Buffer:
        """Memory for a bucket: if possible where the node's other ranks can read it."""
        is_free = self._is_home_free()
        if is_free:
            self.reduced = None
        numel, dtype = self.layout.padded_numel, self.reduce_dtype
        if self.context.stage.gradient is Placement.SHARD:
            if self.region is not None and self.region.user is self.owner:
                return self.region.buffer(self.region_offset, numel, dtype)
        elif is_free and self.home is not None:
            return self.home
        elif is_free and self.region is not None:
            return self.region.buffer(self.region_offset, numel, dtype)
        return Buffer(self.context.shard_group.allocate(numel, dtype))

    def discard_gradients(self) -> None:
        """Forget what is in the bucket."""
        is_private = self.bucket is not None and self.bucket.peers is None
        if self.bucket and is_private and self.context.stage.gradient is Placement.SHARD:
            self.context.memory.add("buffers", -self.bucket.nbytes)
        self.bucket = None
        self.present = [False] * len(self.parameters)

    def is_readable(self) -> bool:
        """Whether the node's other ranks can read the bucket, or can if one is made for this reduction."""
        if self.bucket is not None:
            return self.bucket.peers is not None
        if self.context.stage.gradient is Placement.REPLICATE:
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
        bucket = self._bucket()
        flat = bucket.tensor
        for i, present in enumerate(self.present):
            if not present:
                self.view(flat, i).zero_()
        peers = bucket.peers if in_place else None
        ranges, stage = self.layout.shard_ranges, self.context.stage
        group, replicas = self.context.shard_group, self.context.replica_group
        home = bucket
        if stage.optimizer_state is Placement.REPLICATE:
            reduce_all(flat, ranges, group, scale=scale, peers=peers)
            result = flat
        else:
            if stage.gradient is Placement.REPLICATE:
                base = self.shard_index * self.layout.shard_numel
                result = flat[base : base + self.layout.shard_numel]
            else:
                home = self._gradient_shard()
                result = home.tensor
            exact = result[: self.own.numel]
            self._reduce_blocks(flat, exact, scale, peers)
            if replicas is not None:
                parts = FlatLayout([(exact.numel(),)], replicas.size).shard_ranges
                reduce_all(exact, parts, replicas, scale=1.0)
        if all(piece.grad is None for piece in self.pieces):
            self.home = home
        self.discard_gradients()
        self.expected = sum(used)
        self._install_gradients(result, used)

    def _reduce_blocks(
        self, flat: Tensor, own: Tensor, scale: float, peers: Sequence[Tensor] | None
    ) -> None:
        """`own` = `scale` times this rank's block of the sum of `flat` over the shard group. Collective."""
        ranges, group = self.layout.shard_ranges, self.context.shard_group
        if self.packer is None:
            reduce_blocks(flat, own, ranges, group, scale=scale, peers=peers)
            return
        kept = self.packer.nbytes
        reduce_blocks_quantized(flat, own, ranges, group, self.packer, scale=scale, peers=peers)
        self.context.memory.add("buffers", self.packer.nbytes - kept)

    def forget_residuals(self) -> None:
        """Let go of what error feedback has kept of gradients: the weights are others now."""
        if self.packer is not None:
            self.context.memory.add("buffers", -self.packer.forget())

    def _gradient_shard(self) -> Buffer:
        """Memory for a reduced gradient, (shard_numel,): the last one's, if nobody has that any more."""
        if self.home is not None and self._is_home_free():
            return self.home
        numel = self.layout.shard_numel
        return Buffer(self.context.shard_group.allocate(numel, self.reduce_dtype))

    def _is_home_free(self) -> bool:
        """Whether nobody has the last reduced gradients any more: `zero_grad` has been called."""
        if any(piece.grad is not None for piece in self.pieces):
            return False
        return all(memory() is None for memory in self._handed_out)

    def _install_gradients(self, result: Tensor, used: Sequence[bool]) -> None:
        """Make `result` the pieces' gradient, adding where `zero_grad` has not been called.

        Where the reduce dtype is not the main dtype, `.grad` is a marker (NaN, no memory) until
        `cast_gradients`: so `zero_grad` of both kinds is seen, and the gradient takes the reduce
        dtype's memory only.
        """
        if self.reduce_dtype is self.main_dtype:
            lent, handed_out = lend(result)
            for i, piece in enumerate(self.pieces):
                if used[i]:
                    part = self._part(lent, i)
                    piece.grad = part if piece.grad is None else piece.grad.add_(part)
            self._handed_out = [ref for ref in self._handed_out if ref() is not None]
            if handed_out is not None:
                self._handed_out.append(handed_out)
            return
        if self.reduced is not None and any(piece.grad is not None for piece in self.pieces):
            for i, piece in enumerate(self.pieces):
                if used[i]:
                    kept = self._part(self.reduced, i)
                    kept.copy_(self._part(result, i) + (kept if _is_marker(piece.grad) else 0))
        else:
            self.reduced = result
        for i, piece in enumerate(self.pieces):
            if used[i]:
                piece.grad = placeholder(piece, self.main_dtype)

    def gradients(self) -> Iterator[Tensor]:
        """The reduced gradients that this rank holds, in the reduce dtype."""
        for _, gradient in self.named_gradients():
            yield gradient

    def named_gradients(self) -> Iterator[tuple[str, Tensor]]:
        """The same, each with the name of its parameter."""
        for i, (name, piece) in enumerate(zip(self.names, self.pieces, strict=True)):
            if piece.grad is not None:
                if self.reduce_dtype is self.main_dtype:
                    yield name, piece.grad
                elif self.reduced is not None and _is_marker(piece.grad):
                    yield name, self._part(self.reduced, i)

    @contextmanager
    def cast_gradients(self) -> Iterator[None]:
        """While the context lasts, `.grad` of the pieces is the gradient in the main dtype."""
        if self.reduce_dtype is self.main_dtype or self.reduced is None:
            yield
            return
        reduced = self.reduced
        cast = [(i, piece) for i, piece in enumerate(self.pieces) if _is_marker(piece.grad)]
        for i, piece in cast:
            piece.grad = self._part(reduced, i).to(self.main_dtype)
        try:
            yield
        finally:
            for _, piece in cast:
                piece.grad = placeholder(piece, self.main_dtype)

    # -- end -----------------------------------------------------------------------------------

    def leave_shared_memory(self) -> None:
        """Give parameters and pieces memory of this rank's own where they have had the node's."""
        self.bucket = self.region = self.reduced = None
        if self.home is not None and self.home.peers is not None:
            self.home = None
            for piece in self.pieces:
                if piece.grad is not None and not _is_marker(piece.grad):
                    piece.grad = piece.grad.clone()
        if self.full is None:
            return
        if self.context.stage.parameter is Placement.SHARD and self.is_node_copy:
            self.hide()
            self.shard, self.full = self.shard.clone(), None
        else:
            self.full = self.full.clone()
            self.install()
            if self.is_resident:
                base = self.shard_index * self.layout.shard_numel
                self.shard = self.full[base : base + self.layout.shard_numel]
        if self.is_node_copy and self.main_dtype is self.dtype:
            self.main = self.shard
            for i, piece in enumerate(self.pieces):
                piece.data = self._part(self.main, i)

    # -- accounting ----------------------------------------------------------------------------

    @property
    def gradient_nbytes(self) -> int:
        """Bytes that hold gradients for longer than a moment."""
        held = [buffer for buffer in (self.home,) if buffer is not None]
        if self.bucket is not None and self.context.stage.gradient is Placement.REPLICATE:
            held.append(self.bucket)
        return sum(buffer.nbytes for buffer in {id(buffer): buffer for buffer in held}.values())

    def state_piece(self, index: int, value: Tensor) -> Tensor:
        """This rank's part of an elementwise optimizer state of parameter `index`."""
        if self.is_main_replicated:
            return value
        start, stop = self.layout.piece(index, self.shard_index).in_parameter
        return value.reshape(-1)[start:stop].clone()
