"""JSON that others have written, read without trust; JSON of ours, checked before it is written."""

from __future__ import annotations

import json
from typing import Any

from zerompi.errors import CheckpointError


def parse_json(text: bytes, what: str) -> dict[str, Any]:
    """A JSON object in UTF-8.

    Raises:
        CheckpointError: it is none, or has a key twice.
    """
    try:
        content = json.loads(text.decode(), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{what}: expected JSON, got none: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{what}: expected a JSON object, got {type(content).__name__}")
    return content


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a key stands there twice")
    return content


def check_json(value: Any, name: str) -> None:
    """Refuse what would not come back from JSON as it is (lists for tuples excepted).

    Raises:
        TypeError: with the way to the value.
        ValueError: `value` contains itself.
    """
    try:
        _check_nested_json(value, name)
    except RecursionError:
        raise ValueError(f"{name}: expected JSON, got a value that contains itself") from None


def _check_nested_json(value: Any, name: str) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            # json.dumps would make strings of numbers without a word.
            if not isinstance(key, str):
                raise TypeError(f"{name}: expected str keys for JSON, got {key!r}")
            _check_nested_json(item, f"{name}.{key}")
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            _check_nested_json(item, f"{name}[{i}]")
    elif not isinstance(value, str | int | float | None):
        raise TypeError(f"{name}: expected a JSON value, got {type(value).__name__}")
