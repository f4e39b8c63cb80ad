"""Segments: the tensors of docs/data-way.md and the steps between them.

A *segment* is the parameters of one unit that share a dtype and the need of a gradient; it owns the
flat buffers. Nothing here knows when a step happens: hooks.py does.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from zerompi.collectives.all_gather import gather_blocks, gather_node_copies
from zerompi.collectives.broadcast import broadcast
from zerompi.collectives.quantized import Code
from zerompi.context import Context
from zerompi.gradients import Gradients
from zerompi.layout import FlatLayout, Range
from zerompi.placeholder import Placeholder, placeholder
from zerompi.placement import Placement

_NOWHERE = -(1 << 64)


class Segment:
    """Parameters of one unit with the same dtype and the same need of a gradient.

    Args:
        members: (name, parameter) pairs; `parameter.data` is replaced by views of our buffers.
        context: shared by all segments of the partition.

    Attributes:
        full: flat parameters, (padded_numel,), parameter dtype: one for all ranks of the node, or
            this rank's own. Where parameters are sharded, None between uses.
        full_nbytes: its bytes.
        address: of its first byte, or far below all others.
        owned: per parameter, which part of it lies in `shard`.
        is_resident: whether the full parameters are always there: replicated, of a node together, or
            sharded over one rank.
        is_node_copy: whether `full` is there always, once for all ranks of the node.
        secondary: with `node_cache` and without shared memory, this rank's part of what its node
            keeps of `full`; else None.
        is_cached: whether the node has kept `full` since the parameters changed last.
        shard: own block of the flat parameters, (shard_numel,), parameter dtype.
        main: what the optimizer steps; (padded_numel,) or (shard_numel,), main dtype.
        pieces: per parameter, the view of `main` that stands in the optimizer: the whole parameter
            where optimizer states are replicated, else a 1-D piece, perhaps empty.
        is_main_replicated: whether every rank holds all main weights.
        is_mixed: whether the parameter dtype is that of the mixed precision.
        gradients: what is collected and reduced.
        weight_code: how the parameters are quantized when they are gathered, or None.
    """

    def __init__(self, members: Sequence[tuple[str, nn.Parameter]], context: Context) -> None:
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
        self._places = [
            (shape, _contiguous(shape), start)
            for shape, (start, _) in zip(
                self.layout.shapes, self.layout.parameter_ranges, strict=True
            )
        ]
        self.owned = [self.layout.piece(i, self.shard_index) for i in range(len(members))]

        self.is_mixed = precision.param_dtype is not None and first.is_floating_point()
        self.dtype = precision.param_dtype or first.dtype if self.is_mixed else first.dtype
        self.full_nbytes = self.layout.padded_numel * self.dtype.itemsize
        self.main_dtype = torch.float32 if self.is_mixed and self.trainable else self.dtype
        quantize = context.quantize
        self.weight_code = quantize.weight_code(self.dtype) if quantize else None

        self.full = None
        self.is_main_replicated = context.stage.optimizer_state is Placement.REPLICATE
        self.is_node_copy = False
        self.secondary: Tensor | None = None
        self.is_cached = False
        self._versions: list[int] = []
        self.gradients = Gradients(self)

    def allocate(self, node_copy: Tensor | None) -> None:
        """Take memory for the parameters; `node_copy` if the node has one for all its ranks."""
        group, stage = self.context.shard_group, self.context.stage
        self.is_node_copy = node_copy is not None
        is_replicated = stage.parameter is Placement.REPLICATE
        self.is_resident = is_replicated or self.is_node_copy or group.size == 1
        if self.is_resident:
            if node_copy is None:
                node_copy = group.allocate(self.layout.padded_numel, self.dtype)
            base = self.shard_index * self.layout.shard_numel
            self.full = node_copy
            self.shard = self.full[base : base + self.layout.shard_numel]
        else:
            self.shard = group.allocate(self.layout.shard_numel, self.dtype)
        device = self.shard.device
        self._placeholders = [Placeholder(p, self.dtype, device) for p in self.parameters]
        self.main = self._make_main(stage.optimizer_state)
        self.pieces = [
            nn.Parameter(self.part(self.main, i), requires_grad=self.trainable)
            for i in range(len(self.parameters))
        ]

    @property
    def full(self) -> Tensor | None:
        """See the class."""
        return self._full

    @full.setter
    def full(self, full: Tensor | None) -> None:
        self.address = _NOWHERE if full is None else full.data_ptr()  # before `full` is freed
        self._full = full

    @property
    def own_block(self) -> Tensor:
        """The part of `shard` that is not padding."""
        numel = self.own.numel
        return self.shard if numel == self.layout.shard_numel else self.shard[:numel]

    @property
    def parameter_nbytes(self) -> int:
        """Bytes of parameters that are always there; of a node's copy, this rank's share."""
        if self.is_node_copy:
            return self.full_nbytes // self.context.shard_group.node_comm.size
        kept = 0 if self.secondary is None else self.secondary.nbytes
        return self.full_nbytes if self.is_resident else self.shard.nbytes + kept

    def packed_nbytes(self, code: Code | None, dtype: torch.dtype) -> int:
        """Bytes of as many elements as messages have them: quantized, each shard by itself, or not."""
        if code is None:
            return self.layout.numel * dtype.itemsize
        return sum(code.nbytes(shard.numel) for shard in self.layout.shard_ranges)

    @property
    def gather_nbytes(self) -> int:
        """Bytes that a gather of the parameters would have to move now."""
        if not self.is_cached:
            return self.packed_nbytes(self.weight_code, self.dtype)
        return 0 if self.secondary is None else self.packed_nbytes(None, self.dtype)

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

    def part(self, flat: Tensor, index: int) -> Tensor:
        """The view of parameter `index` in a tensor placed like the optimizer states."""
        if self.is_main_replicated:
            return self.view(flat, index)
        start, stop = self.owned[index].in_shard
        return flat[start:stop]

    def view(self, flat: Tensor, index: int) -> Tensor:
        """Parameter `index` with its own shape in a full flat tensor."""
        shape, strides, start = self._places[index]
        return flat.as_strided(shape, strides, int(flat.storage_offset()) + start)

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
        self.gradients.forget_residuals()
        if self.is_node_copy:
            self._set_node_copy(values)
        else:
            self.own_block.copy_(own)
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
        piece = self.owned[index]
        if self.is_main_replicated:
            return piece.in_parameter, self.main[piece.in_flat.start : piece.in_flat.stop]
        return piece.in_parameter, self.main[piece.in_shard.start : piece.in_shard.stop]

    # -- parameters ----------------------------------------------------------------------------

    def install(self, flat: Tensor | None = None) -> None:
        """Make the parameters views of `flat`, (padded_numel,); None is `full`."""
        flat = self.full if flat is None else flat
        assert flat is not None
        base = int(flat.storage_offset())
        for parameter, (shape, strides, start) in zip(self.parameters, self._places, strict=True):
            parameter.data = flat.as_strided(shape, strides, base + start)
        if self.is_node_copy:
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

    def fill_own_block(self) -> None:
        """Copy this rank's block into `full`, whose rest is to come."""
        assert self.full is not None
        start, stop = self.own
        self.full[start:stop].copy_(self.own_block)

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
        return 0 <= tensor.data_ptr() - self.address < self.full_nbytes

    def hide(self) -> None:
        """Leave placeholders where the parameters' values were."""
        for parameter, hidden in zip(self.parameters, self._placeholders, strict=True):
            parameter.data = hidden.fresh()

    @property
    def refresh_gathers(self) -> bool:
        """Whether `refresh` moves what other ranks have stepped."""
        is_alone = self.context.shard_group.size == 1
        if self.is_main_replicated or is_alone or not self.is_resident:
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

    # -- end -----------------------------------------------------------------------------------

    def leave_shared_memory(self) -> None:
        """Give parameters and pieces memory of this rank's own where they have had the node's."""
        self.gradients.leave_shared_memory()
        if self.full is None:
            return
        if self.is_resident and self.context.stage.parameter is Placement.SHARD:
            self.hide()
            if self.is_node_copy:
                self.shard = self.shard.clone()
            self.full = None
        else:
            self.full = self.full.clone()
            self.install()
            if self.is_resident:
                base = self.shard_index * self.layout.shard_numel
                self.shard = self.full[base : base + self.layout.shard_numel]
        if self.is_node_copy and self.main_dtype is self.dtype:
            self.main = self.shard
            for i, piece in enumerate(self.pieces):
                piece.data = self.part(self.main, i)

    # -- accounting ----------------------------------------------------------------------------

    def state_piece(self, index: int, value: Tensor) -> Tensor:
        """This rank's part of an elementwise optimizer state of parameter `index`."""
        if self.is_main_replicated:
            return value
        start, stop = self.owned[index].in_parameter
        return value.reshape(-1)[start:stop].clone()


def _contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    """The strides of a contiguous tensor."""
    return torch.empty(shape, device="meta").stride()
