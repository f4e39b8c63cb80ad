"""Tensors that autograd saves in a unit's forward: views of its freed buffer come back when needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zerompi.unit import Unit

_autograd = torch._C._autograd


class SavedParameters:
    """Saved-tensor hooks around the forward of a unit (see `torch.autograd.graph`).

    Backward may need a parameter before, or without, a gradient of the unit's output: it flows
    through something that the unit kept, or the output was changed in place. So a saved view of the
    unit's flat buffer asks for the buffer when it is unpacked. Other tensors, and these hooks' own
    nesting, are left to the hooks that were there before (activation checkpointing, offloading).

    Args:
        unit: whose buffers are looked for.
        need: called before a saved parameter is used.
    """

    def __init__(self, unit: Unit, need: Callable[[Unit], None]) -> None:
        self._unit = unit
        self._need = need
        self._storages = {s.full.tensor.untyped_storage()._cdata for s in unit.segments}

    def push(self) -> None:
        """Begin: from here on tensors are saved through us."""
        outer: Any = _autograd._top_saved_tensors_default_hooks(True)
        pack_outer, unpack_outer = outer or (_same, _same)

        def pack(tensor: Tensor) -> tuple[bool, Any]:
            if tensor.layout is torch.strided and (
                tensor.untyped_storage()._cdata in self._storages
            ):
                return True, tensor
            return False, pack_outer(tensor)

        def unpack(packed: tuple[bool, Any]) -> Tensor:
            is_ours, value = packed
            if not is_ours:
                original: Tensor = unpack_outer(value)
                return original
            self._need(self._unit)
            parameter: Tensor = value
            return parameter

        _autograd._push_saved_tensors_default_hooks(pack, unpack)

    def pop(self) -> None:
        """End of what the last `push` began."""
        _autograd._pop_saved_tensors_default_hooks()


def _same(tensor: Tensor) -> Tensor:
    return tensor
