"""Tensors inside the arguments and results of modules: tuples, lists, dicts, dataclasses of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor


def map_arguments(
    function: Callable[[Tensor], Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call with `function` applied to tensors and tensors in tuples.

    Lists, dicts and objects are passed on as they are: the callee may change them for its caller.
    """
    return _mapped(function, args), {key: _mapped(function, item) for key, item in kwargs.items()}


def _mapped(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    # A closure that calls itself would live, with the tensors that `function` knows, until Python
    # looks for garbage.
    if isinstance(value, Tensor):
        return function(value)
    if type(value) is tuple:
        return tuple([_mapped(function, item) for item in value])
    return value


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """The same structure with `function` applied to each tensor; the original is left as it is.

    Parts without a changed tensor are passed on themselves, not copied.
    """
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        items = {key: map_tensors(function, item) for key, item in value.items()}
        changed = {key: item for key, item in items.items() if item is not value[key]}
        if not changed:
            return value
        if not isinstance(value, MutableMapping):
            return type(value)(items)  # type: ignore[call-arg]
        result = copy.copy(value)
        for key, item in changed.items():
            result[key] = item
        return result
    if isinstance(value, (tuple, list)):
        mapped = [map_tensors(function, item) for item in value]
        if all(a is b for a, b in zip(mapped, value, strict=True)):
            return value
        if hasattr(value, "_fields"):
            return type(value)(*mapped)
        return type(value)(mapped)
    if is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in fields(value)]
        updates = {name: map_tensors(function, getattr(value, name)) for name in names}
        changed = {name: item for name, item in updates.items() if item is not getattr(value, name)}
        if not changed:
            return value
        twin = copy.copy(value)
        for name, item in changed.items():
            object.__setattr__(twin, name, item)
        return twin
    return value
