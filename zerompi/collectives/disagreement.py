"""The error of ranks that do not do the same: what each was about to do, and where its program was."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NamedTuple

from mpi4py import MPI

from zerompi.activity import listed, own_place
from zerompi.errors import MismatchError
from zerompi.launch import first_with, raised_by_all

_MAX_SIDES = 8  # that are shown


class _Side(NamedTuple):
    """What a rank was about to do, where its program is, and the exception that it is leaving with."""

    signature: str
    place: tuple[str, ...]
    error: str | None


def disagreement(comm: MPI.Intracomm, signature: str) -> MismatchError:
    """The error that all ranks raise. Collective.

    A rank that is here because of an exception reports it, since that has led to the disagreement.
    """
    caught = sys.exc_info()[1]
    error = None if caught is None else f"{type(caught).__name__}: {caught}"[:500]
    everyone: list[_Side] = comm.allgather(_Side(signature[:500], own_place(), error))
    teller = first_with([side.error for side in everyone]) or 0
    sides = "; ".join(_list_sides([_text(side) for side in everyone]))
    places = _list_sides(["\n    ".join([_text(side), *side.place]) for side in everyone])
    report = "\n".join(["ranks disagree on what comes next:", *places]).splitlines()
    told = MismatchError(f"ranks disagree on what comes next: {sides}")
    return raised_by_all(told, comm.rank, teller=teller, report=report)


def _text(side: _Side) -> str:
    if side.error is None or side.error.partition(": ")[2] in side.signature:
        return side.signature
    return f"{side.signature}, after {side.error}"


def _list_sides(texts: Sequence[str]) -> list[str]:
    """Each text once, the first ones, with the ranks that have it."""
    ranks_of: dict[str, list[int]] = {}
    for rank, text in enumerate(texts):
        ranks_of.setdefault(text, []).append(rank)
    sides = [
        f"rank{'s' if len(ranks) > 1 else ''} {listed(ranks)}: {text}"
        for text, ranks in ranks_of.items()
    ]
    more = [f"and {len(sides) - _MAX_SIDES} more"] if len(sides) > _MAX_SIDES else []
    return sides[:_MAX_SIDES] + more
