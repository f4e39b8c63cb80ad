"""Models on the meta device: filled unit by unit, so that no rank ever holds the whole model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch
from torch import nn

from zerompi.placeholder import placeholder
from zerompi.unit import Unit


def land(model: nn.Module, device: torch.device) -> set[int] | None:
    """Put meta parameters and buffers on a device, that of the other parameters.

    A parameter keeps its identity and gets no memory (it is a placeholder that reads as NaN); a
    buffer gets memory, NaN if it is of a floating-point dtype, so that what nobody fills is
    noticed.

    Returns:
        The ids of these parameters; None if nothing was on the meta device.
    """
    landed: set[int] = set()
    any_buffer = False
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None and parameter.is_meta:
                host = nn.Parameter(
                    placeholder(parameter, parameter.dtype, device),
                    requires_grad=parameter.requires_grad,
                )
                torch.utils.swap_tensors(parameter, host)
                landed.add(id(parameter))
        for key, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                empty = torch.zeros(buffer.shape, dtype=buffer.dtype, device=device)
                if buffer.is_floating_point():
                    empty.fill_(float("nan"))
                module._buffers[key] = empty
                any_buffer = True
    return landed if landed or any_buffer else None


def initialise(model: nn.Module, units: Sequence[Unit], landed: set[int]) -> set[str]:
    """Run `reset_parameters` of the modules that have it, unit by unit, on rank 0. Collective.

    Returns:
        Names of parameters and buffers that are still without values: a checkpoint must fill them.
    """
    unit_of = {
        id(parameter): unit
        for unit in units
        for segment in unit.segments
        for parameter in segment.parameters
    }
    modules_of: dict[Unit, list[nn.Module]] = {}
    for module in model.modules():
        own = [p for p in module._parameters.values() if p is not None and id(p) in landed]
        if own and _reset_method(module) is not None:
            modules_of.setdefault(unit_of[id(own[0])], []).append(module)
    for unit, modules in modules_of.items():
        # A module may hold, beside its unit's, parameters that several units share.
        involved = {
            id(unit_of[id(p)]): unit_of[id(p)]
            for module in modules
            for p in module._parameters.values()
            if p is not None
        }
        involved[id(unit)] = unit
        _reset([other for other in units if id(other) in involved], modules)
    return _without_values(model, units)


def _reset(units: Sequence[Unit], modules: Sequence[nn.Module]) -> None:
    with ExitStack() as stack:
        for unit in units:
            stack.enter_context(unit.main_weights())
        if units[0].context.world.rank == 0:
            with torch.no_grad():
                for module in modules:
                    method = _reset_method(module)
                    if method is not None:
                        method()


def _reset_method(module: nn.Module) -> Callable[[], None] | None:
    """`reset_parameters`, or `_reset_parameters` as in torch's attention and transformer modules."""
    for name in ("reset_parameters", "_reset_parameters"):
        method: Callable[[], None] | None = getattr(module, name, None)
        if callable(method):
            return method
    return None


def _without_values(model: nn.Module, units: Sequence[Unit]) -> set[str]:
    comm = units[0].context.world.comm
    names = {
        name
        for unit in units
        for segment in unit.segments
        for index, name in enumerate(segment.names)
        if bool(torch.isnan(segment.own_values(index)[1]).any())
    }
    for everywhere in comm.allgather(names):
        names |= everywhere
    empty_buffers = {
        name
        for name, buffer in model.named_buffers()
        if buffer.is_floating_point() and buffer.numel() and bool(torch.isnan(buffer).all())
    }
    return names | set(comm.bcast(empty_buffers, root=0))
