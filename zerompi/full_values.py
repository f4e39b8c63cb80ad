"""The whole model for a moment: `gathered`, `full_state_dict` and `load_full_state_dict` of `Zero`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from zerompi import state as states
from zerompi.activity import phase
from zerompi.agreement import agreement
from zerompi.parts import Parts
from zerompi.unit import Unit


class FullValues:
    """Shows and takes whole parameters; the methods are documented in `Zero`."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._rank = parts.context.world.rank

    @contextmanager
    def gathered(self, module: nn.Module | None, writable: bool) -> Iterator[None]:
        """See `Zero.gathered`."""
        parts = self._parts
        parts.check_open()
        units = parts.units_of(parts.model if module is None else module)
        names = ", ".join(unit.name for unit in units)
        what = f"gathered(writable={writable}) of {names}"
        parts.agree(what, None if writable else "agree", what)
        with ExitStack() as stack:
            for unit in units:
                if writable:
                    stack.enter_context(unit.main_weights())
                else:
                    stack.enter_context(_held(unit))
            if not writable and torch.is_grad_enabled():
                stack.enter_context(parts.hooks.saved_parameters(units))
            yield
        if writable:
            filled = {id(p) for p in (module or parts.model).parameters()}
            parts.without_values -= {
                entry.name for entry in states.entries(units) if id(entry.parameter) in filled
            }

    @phase("full_state_dict")
    def state_dict(self, rank0_only: bool) -> dict[str, Tensor]:
        """See `Zero.full_state_dict`."""
        parts = self._parts
        parts.synchronise_buffers()
        what = f"full_state_dict(rank0_only={rank0_only})"
        parts.agree(what, "full_state_dict", rank0_only)
        keep = not rank0_only or self._rank == 0
        values: dict[str, Tensor] = {}
        for unit in parts.units:
            for segment in unit.segments:
                flat = segment.main_values()
                if keep:
                    for index, name in enumerate(segment.names):
                        values[name] = segment.view(flat, index).to("cpu", copy=True)
        if not keep:
            return {}
        for name, buffer in states.persistent_buffers(parts.model).items():
            values[name] = buffer.detach().cpu().clone()
        stored_as = {key: parts.aliases.get(key, key) for key in parts.state_keys}
        return {key: values[name] for key, name in stored_as.items() if name in values}

    @phase("load_full_state_dict")
    def load_state_dict(self, sd: Mapping[str, Tensor] | None) -> None:
        """See `Zero.load_full_state_dict`."""
        parts = self._parts
        parts.agree("load_full_state_dict")
        given: dict[str, Tensor] = {}
        with agreement(parts.context.world.comm):
            if self._rank == 0:
                given = {key: torch.as_tensor(value) for key, value in (sd or {}).items()}
                shapes = {key: value.shape for key, value in given.items()}
                match = states.match_names(shapes, parts.model, parts.units, parts.aliases)
                states.refuse_problems("sd", match.problems)
                given = {parts.aliases.get(key, key): value for key, value in given.items()}
        for unit in parts.units:
            for segment in unit.segments:
                flat = segment.zeros_like_full()
                if self._rank == 0:
                    for index, name in enumerate(segment.names):
                        segment.view(flat, index).copy_(given[name])
                segment.set_values(flat)
        if self._rank == 0:
            for name, buffer in states.persistent_buffers(parts.model).items():
                buffer.detach().copy_(given[name])
        parts.hooks.buffers.synchronise(everything=True)
        parts.without_values.difference_update(parts.state_keys)


@contextmanager
def _held(unit: Unit) -> Iterator[None]:
    unit.holds += 1
    try:
        unit.unshard()
        yield
    finally:
        unit.holds -= 1
        unit.reshard()
