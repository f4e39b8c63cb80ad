"""What torch offers and a partitioned model cannot do is refused, with what to do instead."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from zerompi.errors import ZerompiError
from zerompi.parts import Parts
from zerompi.placement import Placement


class Guards:
    """Hooks on the model's forward, `state_dict` and `load_state_dict`, until `remove`."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        model = parts.model
        self._handles = [
            model.register_forward_pre_hook(self._refuse_without_values, prepend=True),
            model.register_load_state_dict_pre_hook(self._refuse_load_state_dict),
            *(m.register_state_dict_pre_hook(self._refuse_state_dict) for m in model.modules()),
        ]

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()

    def _refuse_without_values(self, module: nn.Module, args: Any) -> None:
        without_values = self._parts.without_values
        if not without_values:
            return
        for name, buffer in self._parts.model.named_buffers():
            if not torch.isnan(buffer).all():
                without_values.discard(name)  # filled by hand
        names = sorted(without_values)
        if names:
            raise ZerompiError(
                f"{len(names)} tensors were on the meta device and have no values yet: "
                f"{', '.join(names[:5])}{' ...' if len(names) > 5 else ''}; call zero.load(...), or "
                "give their modules a reset_parameters method; buffers that no checkpoint holds can be "
                "made on the host"
            )

    def _refuse_state_dict(self, module: nn.Module, prefix: str, keep_vars: bool) -> None:
        self._parts.hooks.refreshes.finish()
        if any(unit.is_hidden for unit in self._parts.units_of(module)):
            raise ZerompiError(
                "model.state_dict() of a partitioned model: the parameters are not here; use "
                "zero.full_state_dict(), or call it inside zero.gathered()"
            )

    def _refuse_load_state_dict(self, *args: Any) -> None:
        self._parts.hooks.refreshes.finish()
        segments = [segment for unit in self._parts.units for segment in unit.segments]
        if (
            any(s.main_dtype is not s.dtype or s.is_node_copy for s in segments)
            or self._parts.context.stage.parameter is Placement.SHARD
        ):
            raise ZerompiError(
                "model.load_state_dict() would not reach the main weights of a partitioned model; use "
                "zero.load_full_state_dict()"
            )
