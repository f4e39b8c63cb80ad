"""Tensors that autograd saves in a unit's forward: views of its parameters come back when needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zerompi.segment import Segment
from zerompi.unit import Unit

_autograd = torch._C._autograd


class _Place(NamedTuple):
    """Where in a unit's full parameters a saved tensor lies."""

    segment: Segment
    offset: int  # elements
    size: tuple[int, ...]
    stride: tuple[int, ...]


class SavedParameters:
    """Saved-tensor hooks around the forward of a unit (see `torch.autograd.graph`).

    The full parameters are gathered again for backward, and need not lie where they lay in forward.
    So of a saved view only its place among them is kept; when it is unpacked, it is asked for them
    (backward may need a parameter before, or without, a gradient of the unit's output: it flows through
    something that the unit kept, or the output was changed in place). Other tensors, and these hooks' own
    nesting, are left to the hooks that were there before (activation checkpointing, offloading).

    Args:
        unit: whose parameters are looked for.
        need: called before a saved parameter is used.
    """

    def __init__(self, unit: Unit, need: Callable[[Unit], None]) -> None:
        self._unit = unit
        self._need = need

    def push(self) -> None:
        """Begin: from here on tensors are saved through us."""
        outer: Any = _autograd._top_saved_tensors_default_hooks(True)
        pack_outer, unpack_outer = outer or (_same, _same)

        def pack(tensor: Tensor) -> Any:
            segment = self._segment_of(tensor)
            if segment is None:
                return pack_outer(tensor)
            if tensor.dtype is not segment.dtype or tensor.is_conj() or tensor.is_neg():
                return pack_outer(tensor.clone())  # more than a place
            assert segment.full is not None
            offset = int(tensor.storage_offset()) - int(segment.full.storage_offset())
            return _Place(segment, offset, tuple(tensor.size()), tensor.stride())

        def unpack(packed: Any) -> Tensor:
            if not isinstance(packed, _Place):
                original: Tensor = unpack_outer(packed)
                return original
            self._need(self._unit)
            full = packed.segment.full
            assert full is not None
            offset = int(full.storage_offset()) + packed.offset
            return full.as_strided(packed.size, packed.stride, offset)

        _autograd._push_saved_tensors_default_hooks(pack, unpack)

    def _segment_of(self, tensor: Tensor) -> Segment | None:
        """The segment in whose full parameters the tensor lies."""
        if tensor.layout is torch.strided:
            for segment in self._unit.segments:
                if segment.covers(tensor):
                    return segment
        return None

    def pop(self) -> None:
        """End of what the last `push` began."""
        _autograd._pop_saved_tensors_default_hooks()


def _same(tensor: Tensor) -> Tensor:
    return tensor
