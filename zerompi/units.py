"""Which parameters are gathered together: units, and which unit owns a parameter."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from torch import nn

_CONTAINERS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)


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
    paths: dict[int, list[list[int]]] = {}  # parameter -> the units around each of its places
    parameter_of: dict[int, tuple[str, nn.Parameter]] = {}

    def visit(module: nn.Module, path: list[int]) -> None:
        if id(module) in chosen and id(module) not in path:
            path = [*path, id(module)]
        for name, parameter in module.named_parameters(recurse=False):
            paths.setdefault(id(parameter), []).append(path)
            prefix = names[id(module)]
            full_name = f"{prefix}.{name}" if prefix else name
            parameter_of.setdefault(id(parameter), (full_name, parameter))
        for child in module.children():
            visit(child, path)

    visit(model, [id(model)])
    plans = {id(model): UnitPlan("", model, [])}
    for name, module in model.named_modules():
        if id(module) in chosen and module is not model:
            plans[id(module)] = UnitPlan(name, module, [])
    for key, places in paths.items():
        plans[_closest_common(places)].parameters.append(parameter_of[key])
    return [plan for plan in plans.values() if plan.parameters or plan.module is model]


def _closest_common(paths: Sequence[Sequence[int]]) -> int:
    """The innermost unit on all paths from the root: also one that hangs in several places itself."""
    return next(unit for unit in reversed(paths[0]) if all(unit in path for path in paths))


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
        if isinstance(module, _CONTAINERS):
            candidates = [
                child
                for child in children
                if not isinstance(child, _CONTAINERS) and any(True for _ in child.parameters())
            ]
            counts = Counter(type(child) for child in candidates)
            blocks = [child for child in candidates if counts[type(child)] > 1]
            found.extend(blocks)
            children = [child for child in children if not any(child is block for block in blocks)]
        for child in children:
            visit(child)

    visit(model)
    return found
