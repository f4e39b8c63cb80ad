"""Some of the many cases of a test, such that every pair of values of its parameters still occurs.

A test that is marked `cover` runs with a covering array of its cases, fixtures' parameters among
them: of any two parameters each pair of values that some case has. `cover(1)` asks for every value
only, where nothing depends on two of them together; `cover(3)` for all that any three have.
`where=` says of the parameters of a case, a dict, whether it can be: others run nowhere, and what
only they have need not occur. Tests with known interactions of three parameters are not marked.

ZEROMPI_ALL_CASES=1 runs all cases that can be; so does a case named on pytest's command line.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Hashable, Sequence
from itertools import combinations
from operator import itemgetter
from typing import Any, NamedTuple

import pytest

ALL_CASES = "ZEROMPI_ALL_CASES"


class _Arguments(NamedTuple):
    """Of the marker."""

    strength: int = 2
    where: Callable[[dict[str, Any]], bool] = lambda case: True


def covering(rows: Sequence[Sequence[Hashable]], strength: int = 2, *, seed: str = "") -> list[int]:
    """Positions of few rows, ascending, in which all that `strength` columns have together occurs.

    Greedy: next comes a row with most of what is missing, of several the first in an order that
    `seed` decides.
    """
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    parts = [
        {
            (columns, tuple(row[column] for column in columns))
            for columns in combinations(range(len(row)), min(strength, len(row)))
        }
        for row in rows
    ]
    missing = set().union(*parts)
    chosen = []
    while missing:
        best = max(order, key=lambda position: len(parts[position] & missing))
        chosen.append(best)
        missing -= parts[best]
    return sorted(chosen)


def all_cases() -> bool:
    """Whether the environment asks for all of them."""
    return os.environ.get(ALL_CASES, "0") != "0"


def cases_left_out(items: Sequence[pytest.Item], seed: str) -> set[pytest.Item]:
    """Those of the collected tests that need not run."""
    tests: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("cover") is not None and hasattr(item, "callspec"):
            tests.setdefault(item.nodeid.partition("[")[0], []).append(item)
    return {item for cases in tests.values() for item in _left_out(cases, seed)}


def _left_out(cases: list[pytest.Item], seed: str) -> set[pytest.Item]:
    marker = cases[0].get_closest_marker("cover")
    arguments = _Arguments(*marker.args, **marker.kwargs)
    possible = [case for case in cases if arguments.where(case.callspec.params)]
    if all_cases():
        return set(cases).difference(possible)
    # Cases that have a value have the same object, which need not be hashable.
    rows = [
        tuple(
            (name, id(value))
            for name, value in sorted(case.callspec.params.items(), key=itemgetter(0))
        )
        for case in possible
    ]
    chosen = covering(rows, arguments.strength, seed=seed)
    return set(cases).difference(possible[position] for position in chosen)
