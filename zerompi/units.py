"""Which parameters are gathered together: units, and which unit owns a parameter."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from torch import nn


class UnitPlan(NamedTuple):
    """A module whose own parameters form one unit."""

    name: str
    module: nn.Module
    parameters: list[tuple[str, nn.Parameter]]


Units = Sequence[nn.Module] | Callable[[nn.Module], bool] | None


def plan_units(model: nn.Module, units: Units = None) -> list[UnitPlan]:
    """Divide all parameters of `model` among units, in module order; the root comes first.

    Every parameter belongs to the closest enclosing unit; one that several modules share, to the
    closest unit that encloses all of them. The root is always a unit, if only an empty one.

    Args:
        model: any module.
        units: modules, or a predicate on modules; None finds the repeated blocks.

    Raises:
        TypeError: `units` is neither, or holds something that is no module.
        ValueError: a module of `units` is not part of `model`.
    """
    chosen = _chosen_modules(model, units)
    names = {id(module): name for name, module in model.named_modules()}
    owner: dict[int, list[int]] = {}  # parameter -> path of unit module ids from the root
    parameter_of: dict[int, tuple[str, nn.Parameter]] = {}

    def visit(module: nn.Module, path: list[int]) -> None:
        if id(module) in chosen and id(module) not in path:
            path = [*path, id(module)]
        for name, parameter in module.named_parameters(recurse=False):
            key = id(parameter)
            if key in owner:
                # A unit that hangs in several places keeps its own: its hooks run at every call.
                if owner[key][-1] != path[-1]:
                    owner[key] = _common_prefix(owner[key], path)
            else:
                owner[key] = path
                prefix = names[id(module)]
                parameter_of[key] = (f"{prefix}.{name}" if prefix else name, parameter)
        for child in module.children():
            visit(child, path)

    visit(model, [id(model)])
    plans = {id(model): UnitPlan("", model, [])}
    for name, module in model.named_modules():
        if id(module) in chosen and module is not model:
            plans[id(module)] = UnitPlan(name, module, [])
    for key, path in owner.items():
        plans[path[-1]].parameters.append(parameter_of[key])
    return [plan for plan in plans.values() if plan.parameters or plan.module is model]


def _common_prefix(a: list[int], b: list[int]) -> list[int]:
    length = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        length += 1
    return a[:length]


def _chosen_modules(model: nn.Module, units: Units) -> set[int]:
    if units is None:
        return {id(module) for module in _repeated_blocks(model)}
    if callable(units) and not isinstance(units, nn.Module):
        return {id(module) for module in model.modules() if units(module)}
    if isinstance(units, nn.Module) or not isinstance(units, Iterable):
        raise TypeError(
            f"units: expected a sequence of modules, a predicate or None, got {type(units).__name__}"
        )
    known = {id(module) for module in model.modules()}
    chosen = set()
    for module in units:
        if not isinstance(module, nn.Module):
            raise TypeError(f"units: expected modules, got {type(module).__name__}")
        if id(module) not in known:
            raise ValueError(f"units: expected modules of the model, got {module}")
        chosen.add(id(module))
    return chosen


def _repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The outermost children of containers whose class occurs there at least twice."""
    found: list[nn.Module] = []

    def visit(module: nn.Module) -> None:
        children = list(module.children())
        if isinstance(module, (nn.ModuleList, nn.Sequential, nn.ModuleDict)):
            counts = Counter(type(child) for child in children if _has_parameters(child))
            blocks = [
                child
                for child in children
                if counts[type(child)] > 1
                and _has_parameters(child)
                and not isinstance(child, (nn.ModuleList, nn.Sequential, nn.ModuleDict))
            ]
            found.extend(blocks)
            children = [child for child in children if not any(child is block for block in blocks)]
        for child in children:
            visit(child)

    visit(model)
    return found


def _has_parameters(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())
