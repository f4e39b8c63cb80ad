"""Which parameters are gathered together: units, and which unit owns a parameter."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from torch import nn

_CONTAINERS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)
# Small blocks are merged up to this size, and this part of all of them: units overlap each other.
_MERGED_NBYTES = 4 << 20
_FEWEST_UNITS = 8
# Where parameters are replicated, what is as large is reduced by itself; and a larger block in parts.
_LARGE_NBYTES = 1 << 20
_BLOCK_NBYTES = 512 << 20


class UnitPlan(NamedTuple):
    """Modules whose own parameters form one unit.

    Attributes:
        members: the modules, with their names in the model; several where small ones are merged.
        parameters: what is theirs, with names.
    """

    members: list[tuple[str, nn.Module]]
    parameters: list[tuple[str, nn.Parameter]]

    @property
    def name(self) -> str:
        """The name of the module, or of the first and the last: "blocks.0-blocks.3"."""
        first, last = self.members[0][0], self.members[-1][0]
        return first if len(self.members) == 1 else f"{first}-{last}"


Units = Sequence[nn.Module] | Callable[[nn.Module], bool] | None


def plan_units(
    model: nn.Module, units: Units = None, *, is_replicated: bool = False
) -> list[UnitPlan]:
    """Divide all parameters of `model` among units, in module order; the root comes first.

    Every parameter belongs to the closest enclosing unit; one that several modules share, to the
    closest unit that encloses all of them. The root is always a unit, if only an empty one.

    With `units` None the repeated blocks are units. Small ones that follow each other in one container
    are merged. Where parameters are replicated, large modules outside of the blocks, and large parts of
    them, are units, too; elsewhere not, as their parameters may be read without a call of the module,
    which would not gather them.

    Args:
        model: any module.
        units: modules, or a predicate on modules, taken as they are; None leaves the choice to us.
        is_replicated: whether parameters can be read at any time.

    Raises:
        TypeError: `units` is neither, or holds something that is no module.
        ValueError: a module of `units` is not part of `model`.
    """
    if units is None:
        groups = _automatic(model, is_replicated=is_replicated)
    else:
        groups = [[module] for module in _chosen_modules(model, units)]
    unit_of = {id(module): id(group[0]) for group in groups for module in group}
    unit_of[id(model)] = id(model)
    names = {id(module): name for name, module in model.named_modules()}
    paths: dict[int, list[list[int]]] = {}  # parameter -> the units around each of its places
    parameter_of: dict[int, tuple[str, nn.Parameter]] = {}

    def visit(module: nn.Module, path: list[int]) -> None:
        unit = unit_of.get(id(module))
        if unit is not None and unit not in path:
            path = [*path, unit]
        for name, parameter in module.named_parameters(recurse=False):
            paths.setdefault(id(parameter), []).append(path)
            prefix = names[id(module)]
            full_name = f"{prefix}.{name}" if prefix else name
            parameter_of.setdefault(id(parameter), (full_name, parameter))
        for child in module.children():
            visit(child, path)

    visit(model, [])
    plans: dict[int, UnitPlan] = {}
    for name, module in model.named_modules():
        if id(module) in unit_of:
            plan = plans.setdefault(unit_of[id(module)], UnitPlan([], []))
            plan.members.append((name, module))
    for key, places in paths.items():
        plans[_closest_common(places)].parameters.append(parameter_of[key])
    return [plan for key, plan in plans.items() if plan.parameters or key == id(model)]


def _closest_common(paths: Sequence[Sequence[int]]) -> int:
    """The innermost unit on all paths from the root: also one that hangs in several places itself."""
    return next(unit for unit in reversed(paths[0]) if all(unit in path for path in paths))


def _chosen_modules(model: nn.Module, units: Units) -> list[nn.Module]:
    if callable(units) and not isinstance(units, nn.Module):
        return [module for module in model.modules() if units(module)]
    if isinstance(units, nn.Module) or not isinstance(units, Iterable):
        raise TypeError(
            f"units: expected a sequence of modules, a predicate or None, got {type(units).__name__}"
        )
    known = {id(module) for module in model.modules()}
    chosen = []
    for module in units:
        if not isinstance(module, nn.Module):
            raise TypeError(f"units: expected modules, got {type(module).__name__}")
        if id(module) not in known:
            raise ValueError(f"units: expected modules of the model, got {module}")
        chosen.append(module)
    return chosen


# -- automatic choice --------------------------------------------------------------------------


def _automatic(model: nn.Module, *, is_replicated: bool) -> list[list[nn.Module]]:
    runs = _repeated_blocks(model)
    groups = _merged(runs)
    if is_replicated:
        blocks = [block for run in runs for block in run]
        groups += [[module] for module in _large_modules(model, blocks)]
    return groups


def _repeated_blocks(model: nn.Module) -> list[list[nn.Module]]:
    """The outermost children of containers whose class occurs there at least twice, by container."""
    found: list[list[nn.Module]] = []
    known: set[int] = set()

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
            found.append([block for block in blocks if id(block) not in known])
            known.update(id(block) for block in blocks)
            children = [child for child in children if not any(child is block for block in blocks)]
        for child in children:
            visit(child)

    visit(model)
    return found


def _merged(runs: Sequence[Sequence[nn.Module]]) -> list[list[nn.Module]]:
    """Cut each run of blocks into groups of small ones; a large block stays alone."""
    sizes = {id(block): _nbytes(block.parameters()) for run in runs for block in run}
    limit = min(_MERGED_NBYTES, sum(sizes.values()) // _FEWEST_UNITS)
    groups: list[list[nn.Module]] = []
    for run in runs:
        room = -1
        for block in run:
            room -= sizes[id(block)]
            if room < 0:
                groups.append([])
                room = limit - sizes[id(block)]
            groups[-1].append(block)
    return groups


def _large_modules(model: nn.Module, blocks: Sequence[nn.Module]) -> list[nn.Module]:
    """Modules with large parameters of their own outside of the blocks, and the parts of huge blocks."""
    small = {
        id(part)
        for block in blocks
        if _nbytes(block.parameters()) <= _BLOCK_NBYTES
        for part in block.modules()
    }
    known = {id(model), *small, *(id(block) for block in blocks)}
    places = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))

    def is_large(module: nn.Module) -> bool:
        own = [p for p in module.parameters(recurse=False) if places[id(p)] == 1]
        return _nbytes(own) >= _LARGE_NBYTES

    return [module for module in model.modules() if id(module) not in known and is_large(module)]


def _nbytes(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() * parameter.itemsize for parameter in parameters)
