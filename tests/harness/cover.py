"""Some of the many cases of a test, such that every pair of values of its parameters still occurs.

A test that is marked `cover` runs with a covering array of its cases, fixtures' parameters among
them: of any two parameters each pair of values that some case has. `cover(1)` asks for every value
only, where nothing depends on two of them together; `cover(3)` for all that any three have.
`where=` says of the parameters of a case, a dict, whether it can be: others run nowhere, and what
only they have need not occur. Tests with known interactions of three parameters are not marked.

Runs that differ in something else, like the transport, can share the cases. Each has at least one
case of every test, and together they have all that would run alone. Of a test marked `cover` every
value of each parameter occurs in each run.

ZEROMPI_ALL_CASES=1 runs all cases that can be, in one of the runs that share them.
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
    """Positions of few rows, ascending, in which all that `strength` columns have together occurs."""
    return _fewest([_together(row, strength) for row in rows], seed)


def shared(
    rows: Sequence[Sequence[Hashable]], strength: int, runs: int, *, seed: str = ""
) -> list[list[int]]:
    """The same for several runs together: positions for each of them. Each has every value of a column."""
    parts = [
        _together(row, strength) | {(run, value) for value in _together(row, 1)}
        for run in range(runs)
        for row in rows
    ]
    chosen = _fewest(parts, seed)
    return [
        [position % len(rows) for position in chosen if position // len(rows) == run]
        for run in range(runs)
    ]


def dealt(count: int, runs: int, *, seed: str = "") -> list[list[int]]:
    """Positions below `count`, each dealt to one of the runs; where there are too few, to several of them."""
    order = list(range(count))
    random.Random(seed).shuffle(order)
    hands = [sorted(order[run::runs]) or [order[run % count]] for run in range(runs)]
    random.Random(f"{seed}, runs").shuffle(hands)  # so that not the first one has more each time
    return hands


def _together(row: Sequence[Hashable], strength: int) -> set[Hashable]:
    """What `strength` columns of a row have together."""
    return {
        (columns, tuple(row[column] for column in columns))
        for columns in combinations(range(len(row)), min(strength, len(row)))
    }


def _fewest(parts: Sequence[set[Hashable]], seed: str) -> list[int]:
    """Positions of few sets, ascending, that have all that any has.

    Greedy: next comes a set with most of what is missing, of several the first in an order that
    `seed` decides.
    """
    order = list(range(len(parts)))
    random.Random(seed).shuffle(order)
    missing = set[Hashable]().union(*parts)
    chosen = []
    while missing:
        best = max(order, key=lambda position: len(parts[position] & missing))
        chosen.append(best)
        missing -= parts[best]
    return sorted(chosen)


def all_cases() -> bool:
    """Whether the environment asks for all of them."""
    return os.environ.get(ALL_CASES, "0") != "0"


class Sharing(NamedTuple):
    """Which of several runs this is, from 0."""

    run: int
    runs: int


ALONE = Sharing(0, 1)


def cases_left_out(
    items: Sequence[pytest.Item], seed: str, sharing: Sharing = ALONE
) -> set[pytest.Item]:
    """Those of the collected tests that need not run, or run elsewhere."""
    tests: dict[str, list[pytest.Item]] = {}
    for item in items:
        tests.setdefault(item.nodeid.partition("[")[0], []).append(item)
    return {
        item
        for name, cases in tests.items()
        for item in _left_out(cases, f"{seed}, {name}", sharing)
    }


def _left_out(cases: list[pytest.Item], seed: str, sharing: Sharing) -> set[pytest.Item]:
    marker = cases[0].get_closest_marker("cover") if hasattr(cases[0], "callspec") else None
    arguments = _Arguments() if marker is None else _Arguments(*marker.args, **marker.kwargs)
    possible = cases
    if marker is not None:
        possible = [case for case in cases if arguments.where(case.callspec.params)]
    if marker is None or all_cases():
        of_runs = dealt(len(possible), sharing.runs, seed=seed)
    else:
        rows = [_row(case) for case in possible]
        of_runs = shared(rows, arguments.strength, sharing.runs, seed=seed)
    return set(cases).difference(possible[position] for position in of_runs[sharing.run])


def _row(case: pytest.Item) -> tuple[Hashable, ...]:
    """The values of its parameters: cases that have a value have the same object, which need not be hashable."""
    params = sorted(case.callspec.params.items(), key=itemgetter(0))
    return tuple((name, id(value)) for name, value in params)
