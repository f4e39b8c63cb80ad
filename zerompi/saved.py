"""Tensors that autograd saves in a unit's forward: views of its parameters come back when needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zerompi.segment import Segment
from zerompi.unit import Unit

_autograd = torch._C._autograd


class _Place(NamedTuple):
    """Where in a unit's full parameters a saved tensor lies."""

    unit: Unit
    segment: Segment
    offset: int  # elements
    size: tuple[int, ...]
    stride: tuple[int, ...]


class _Pair(NamedTuple):
    """Saved-tensor hooks, and those around which they are, or None."""

    outer: Any
    pack: Callable[[Tensor], Any]
    unpack: Callable[[Any], Tensor]


class SavedParameters:
    """Saved-tensor hooks around the forward of units (see `torch.autograd.graph`).

    The full parameters are gathered again for backward, and need not lie where they lay in forward.
    So of a saved view only its place among them is kept; when it is unpacked, it is asked for them
    (backward may need a parameter before, or without, a gradient of the unit's output: it flows through
    something that the unit kept, or the output was changed in place). Other tensors, and these hooks' own
    nesting, are left to the hooks that were there before (activation checkpointing, offloading).

    Args:
        units: whose parameters are looked for.
        need: called before a saved parameter is used.

    Attributes:
        segments: of these units, each with its unit.
    """

    def __init__(self, units: Sequence[Unit], need: Callable[[Unit], None]) -> None:
        self.segments = [(unit, segment) for unit in units for segment in unit.segments]
        self._need = need
        self._lasting = _Hooks(self, None).pair()

    def push(self) -> None:
        """Begin: from here on tensors are saved through us."""
        outer: Any = _autograd._top_saved_tensors_default_hooks(True)
        pair = self._lasting
        if pair.outer != outer:
            hooks = _Hooks(self, outer)
            pair = hooks.pair()
            if hooks.is_lasting:
                self._lasting = pair
        _autograd._push_saved_tensors_default_hooks(pair.pack, pair.unpack)

    def pop(self) -> None:
        """End of what the last `push` began."""
        _autograd._pop_saved_tensors_default_hooks()

    def restore(self, place: _Place) -> Tensor:
        """The part of the full parameters that lies there."""
        self._need(place.unit)
        full = place.segment.full
        assert full is not None
        return full.as_strided(place.size, place.stride, int(full.storage_offset()) + place.offset)


class _Hooks:
    """Hooks that look for parameters, around the ones that were there before.

    Args:
        outer: the latter; None if there were none.

    Attributes:
        is_lasting: whether they are the same in the next forward, and hold nothing: so are ours, others may
            hold tensors.
    """

    __slots__ = ("_pack_outer", "_saved", "_segments", "_unpack_outer", "is_lasting", "outer")

    def __init__(self, saved: SavedParameters, outer: Any) -> None:
        self._saved = saved
        self._segments = saved.segments
        self.outer = outer
        self._pack_outer: Callable[[Tensor], Any] = _same
        self._unpack_outer: Callable[[Any], Tensor] = _same
        self.is_lasting = True
        if outer is not None:
            self._pack_outer, self._unpack_outer = outer
            around = getattr(self._pack_outer, "__self__", None)
            self.is_lasting = isinstance(around, _Hooks) and around.is_lasting

    def pair(self) -> _Pair:
        return _Pair(self.outer, self.pack, self.unpack)

    def pack(self, tensor: Tensor) -> Any:
        # Called for each tensor that autograd saves: the test is `Segment.covers`, without calls.
        if self._segments and tensor.layout is torch.strided:
            address = tensor.data_ptr()
            for unit, segment in self._segments:
                start = address - segment.address
                if 0 <= start < segment.full_nbytes:
                    return self._place(tensor, unit, segment, start)
        return self._pack_outer(tensor)

    def _place(self, tensor: Tensor, unit: Unit, segment: Segment, start: int) -> Any:
        """What stands for `tensor`, which lies `start` bytes after the beginning of the full parameters."""
        if tensor.dtype is not segment.dtype or tensor.is_conj() or tensor.is_neg():
            return self._pack_outer(tensor.clone())  # more than a place
        offset = start // tensor.itemsize
        return _Place(unit, segment, offset, tuple(tensor.size()), tensor.stride())

    def unpack(self, packed: Any) -> Tensor:
        if isinstance(packed, _Place):
            return self._saved.restore(packed)
        return self._unpack_outer(packed)


def _same(tensor: Tensor) -> Tensor:
    return tensor
