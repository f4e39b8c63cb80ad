"""`zerompi bench`: how fast this machine's collectives are, zerompi's beside the MPI library's."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Optional

import torch
import typer
from mpi4py import MPI
from rich.table import Table

import zerompi
from zerompi.bench.collectives import COLLECTIVES, COPY, Result, measure
from zerompi.launch import threads_per_rank
from zerompi.train.agreement import agree, agree_on_root
from zerompi.train.config import InputError
from zerompi.train.display import make_console

_UNITS = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
_DTYPES = ("float32", "float64", "bfloat16", "float16")


def bench(
    collectives: str = typer.Option(
        ",".join(COLLECTIVES), help="Which collectives, separated by commas."
    ),
    sizes: str = typer.Option(
        "64KiB,1MiB,16MiB,64MiB", help="Bytes of the whole buffer on each rank: 1KiB to 1GiB."
    ),
    dtypes: str = typer.Option("float32", help=f"Of the elements: {', '.join(_DTYPES)}."),
    repeats: int = typer.Option(5, help="How often each way takes its turn."),
    out: Optional[str] = typer.Option(None, help="Write the results to this JSON file."),  # noqa: UP045
    compare: Optional[str] = typer.Option(  # noqa: UP045
        None, help="Show the ratio to the results in this JSON file of an earlier run."
    ),
) -> Callable[[], None]:
    """Time collectives: zerompi's, the MPI library's own, and a plain copy of as many bytes.

    All ways take turns in one run, so that their ratios hold on a machine that others use, too. The
    time is that of the slowest rank, the median of the repetitions.
    """
    return partial(_run, collectives, sizes, dtypes, repeats, out, compare)


def _run(
    collectives: str, sizes: str, dtypes: str, repeats: int, out: str | None, compare: str | None
) -> None:
    world = MPI.COMM_WORLD
    names = agree(world, lambda: _chosen("--collectives", collectives, COLLECTIVES))
    kinds = agree(world, lambda: _chosen("--dtypes", dtypes, _DTYPES))
    nbytes = agree(world, lambda: [_nbytes(size) for size in sizes.split(",")])
    agree(world, lambda: _check_repeats(repeats))
    before = agree_on_root(world, lambda: _read(compare))
    topology = zerompi.Topology(world)
    torch.set_num_threads(threads_per_rank(len(topology.ranks_of_node[0])))
    results = [
        result
        for name in names
        for kind in kinds
        for size in nbytes
        for result in measure(world, name, size, getattr(torch, kind), repeats)
    ]
    agree_on_root(world, lambda: _write(out, results, topology))
    if world.rank == 0:
        make_console().print(_table(results, before, topology))


def _chosen(option: str, text: str, known: Sequence[str]) -> list[str]:
    chosen = text.split(",")
    for name in chosen:
        if name not in known:
            raise InputError(f"{option}: expected some of {', '.join(known)}, got {name!r}")
    return chosen


def _nbytes(size: str) -> int:
    number, unit = size[:-3], size[-3:]
    if unit in _UNITS and number.isdigit() and 0 < int(number) * _UNITS[unit] <= 1 << 30:
        return int(number) * _UNITS[unit]
    raise InputError(f"--sizes: expected sizes such as 64KiB or 16MiB, up to 1GiB, got {size!r}")


def _check_repeats(repeats: int) -> None:
    if repeats < 1:
        raise InputError(f"--repeats: expected at least 1, got {repeats}")


def _key(result: Result) -> str:
    return f"{result.collective} {result.way} {result.dtype} {result.nbytes}"


def _read(path: str | None) -> dict[str, float]:
    """Seconds of an earlier run."""
    if path is None:
        return {}
    try:
        rows = json.loads(Path(path).read_text())["results"]
        return {_key(Result(**row)): float(row["seconds"]) for row in rows}
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"--compare: {path}: expected results of zerompi bench") from error


def _write(path: str | None, results: Sequence[Result], topology: zerompi.Topology) -> None:
    if path is None:
        return
    content = {
        "zerompi": zerompi.__version__,
        "mpi": MPI.Get_library_version().strip("\0").splitlines()[0],
        "ranks": topology.size,
        "nodes": topology.num_nodes,
        "results": [asdict(result) for result in results],
    }
    Path(path).write_text(json.dumps(content, indent=2) + "\n")


def _table(
    results: Sequence[Result], before: dict[str, float], topology: zerompi.Topology
) -> Table:
    """One row for each way; bandwidth is the buffer's bytes by the time, for a copy twice that."""
    columns = ["collective", "dtype", "size", "way", "time", "GB/s", "faster than MPI"]
    title = f"{topology.size} ranks, {topology.num_nodes} nodes; time of the slowest rank"
    table = Table(*columns, *(["before"] if before else []), title=title)
    last = None
    for result in results:
        group = (result.collective, result.dtype, result.nbytes)
        if last not in (None, group):
            table.add_section()
        last = group
        moved = result.nbytes * (2 if result.way == COPY else 1)
        row = [
            result.collective,
            result.dtype,
            _size(result.nbytes),
            result.way,
            _time(result.seconds),
            f"{moved / result.seconds / 1e9:.2f}",
            "" if result.ratio is None else f"{result.ratio:.2f}x",
        ]
        if before:
            seconds = before.get(_key(result))
            row.append("" if seconds is None else f"{seconds / result.seconds:.2f}x")
        table.add_row(*row)
    return table


def _size(nbytes: int) -> str:
    for unit, size in reversed(_UNITS.items()):
        if nbytes >= size:
            return f"{nbytes / size:.4g} {unit}"
    return f"{nbytes} B"


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:,.0f} us" if seconds < 1e-3 else f"{seconds * 1e3:,.2f} ms"
