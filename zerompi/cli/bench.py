"""`zerompi bench`: how fast this machine is with zerompi, beside what else there is."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Optional

import torch
import typer
from mpi4py import MPI

import zerompi
from zerompi.bench import checkpoints as checkpoints_bench
from zerompi.bench import collectives as collectives_bench
from zerompi.bench import device_collectives as device_bench
from zerompi.bench import training as training_bench
from zerompi.bench.plot import plot_checkpoints, plot_collectives, plot_training
from zerompi.bench.tables import (
    UNITS,
    table_of_checkpoints,
    table_of_collectives,
    table_of_training,
)
from zerompi.collectives.choice import Row, write_table
from zerompi.launch import threads_per_rank
from zerompi.train.agreement import agree, agree_on_root
from zerompi.train.config import InputError
from zerompi.train.display import make_console

KINDS = ("collectives", "training", "checkpoint")
_DEVICES = ("cpu", "cuda")
_DTYPES = ("float32", "float64", "bfloat16", "float16")
_COLLECTIVES, _TRAINING, _RESULTS = "Collectives", "Training and checkpoint", "Results"


@dataclass(frozen=True)
class _Options:
    """The options as given."""

    kind: str
    collectives: str
    sizes: str
    dtypes: str
    systems: str | None
    directory: str
    workload: training_bench.Workload
    repeats: int
    out: str | None
    plot: str | None
    compare: str | None
    table: str | None
    device: str
    share_devices: bool
    link: float | None


def bench(
    kind: str = typer.Argument("collectives", help=f"What to measure: {' or '.join(KINDS)}."),
    collectives: str = typer.Option(
        ",".join(collectives_bench.COLLECTIVES),
        help="Which collectives, separated by commas.",
        rich_help_panel=_COLLECTIVES,
    ),
    sizes: str = typer.Option(
        "64KiB,1MiB,16MiB,64MiB",
        help="Bytes of the whole buffer on each rank: 1KiB to 1GiB.",
        rich_help_panel=_COLLECTIVES,
    ),
    device: str = typer.Option(
        "cpu",
        help=f"{' or '.join(_DEVICES)}: with cuda also CuPy arrays, each rank's on a device of its own, with "
        "each transport that works.",
        rich_help_panel=_COLLECTIVES,
    ),
    share_devices: bool = typer.Option(
        False, help="Let several ranks have one device.", rich_help_panel=_COLLECTIVES
    ),
    dtypes: str = typer.Option(
        "float32",
        help=f"Of the elements: {', '.join(_DTYPES)}.",
        rich_help_panel=_COLLECTIVES,
    ),
    systems: Optional[str] = typer.Option(  # noqa: UP045
        None,
        help=f"Which of {', '.join(training_bench.SYSTEMS)}, or for checkpoint of "
        f"{', '.join(checkpoints_bench.SYSTEMS)}; all that are installed if not given, but "
        f"{', '.join(training_bench.ON_NODES)} on several nodes only.",
        rich_help_panel=_TRAINING,
    ),
    directory: str = typer.Option(
        ".", help="Where checkpoints are written, and removed again.", rich_help_panel=_TRAINING
    ),
    layers: int = typer.Option(8, help="Blocks of the GPT.", rich_help_panel=_TRAINING),
    width: int = typer.Option(512, help="Width of the GPT.", rich_help_panel=_TRAINING),
    heads: int = typer.Option(8, help="Heads of each block.", rich_help_panel=_TRAINING),
    context: int = typer.Option(64, help="Bytes of a sequence.", rich_help_panel=_TRAINING),
    batch: int = typer.Option(1, help="Sequences of each rank.", rich_help_panel=_TRAINING),
    steps: int = typer.Option(3, help="Steps timed together.", rich_help_panel=_TRAINING),
    fused: bool = typer.Option(
        False, help="Let all systems step with torch's fused AdamW.", rich_help_panel=_TRAINING
    ),
    link: Optional[float] = typer.Option(  # noqa: UP045
        None,
        help="Gbit/s that a node can send to others: show steps by the bound, which is the longer of the step "
        "without communication and of what a node sends on that link.",
        rich_help_panel=_TRAINING,
    ),
    repeats: int = typer.Option(
        5, help="How often each way, or system, takes its turn.", rich_help_panel=_RESULTS
    ),
    out: Optional[str] = typer.Option(  # noqa: UP045
        None, help="Write the results to this JSON file.", rich_help_panel=_RESULTS
    ),
    plot: Optional[str] = typer.Option(  # noqa: UP045
        None, help="Draw the results into this file (.png, .pdf, .svg).", rich_help_panel=_RESULTS
    ),
    compare: Optional[str] = typer.Option(  # noqa: UP045
        None,
        help="Show the ratio to the results in this JSON file of an earlier run.",
        rich_help_panel=_RESULTS,
    ),
    table: Optional[str] = typer.Option(  # noqa: UP045
        None,
        help="Add to this file up to which size the flat way is faster here; jobs with "
        "ZEROMPI_ALGORITHM_TABLE=FILE choose by it. Needs several nodes of several ranks.",
        rich_help_panel=_RESULTS,
    ),
) -> Callable[[], None]:
    """Time collectives, whole training steps, or checkpoints, beside other libraries and the bound.

    Collectives: the MPI library's own, gloo's, and a plain copy of as many bytes. Training: torch's DDP, FSDP2
    and ZeroRedundancyOptimizer, DeepSpeed, and the same step without communication. Checkpoint:
    torch.distributed.checkpoint with FSDP2, torch.save, and the bare disk. All take turns in one run, so that their ratios hold on a machine that others use, too. The time is that of the slowest rank,
    the median of the repetitions.
    """
    workload = training_bench.Workload(layers, width, heads, context, batch, steps, fused)
    options = _Options(
        kind,
        collectives,
        sizes,
        dtypes,
        systems,
        directory,
        workload,
        repeats,
        out,
        plot,
        compare,
        table,
        device,
        share_devices,
        link,
    )
    return partial(_run, options)


def _run(options: _Options) -> None:
    world = MPI.COMM_WORLD
    topology = zerompi.Topology(world)
    agree(world, lambda: _check(options, topology))
    before = agree_on_root(world, lambda: _read(options.compare))
    torch.set_num_threads(threads_per_rank(len(topology.ranks_of_node[0])))
    title = f"{topology.size} ranks, {topology.num_nodes} nodes"
    title += ", fused AdamW" * options.workload.fused
    results = _MEASURE[options.kind](options, world, topology)
    agree_on_root(world, lambda: _write(options, results, topology))
    if options.table is not None:
        rows = collectives_bench.choice_rows(world, results)
        agree_on_root(world, lambda: _add_to_table(Path(options.table or ""), rows))
    if options.plot is not None:
        path = Path(options.plot)
        agree_on_root(world, lambda: _plot(options.kind, results, title, path))
    if world.rank == 0:
        make_console().print(_TABLE[options.kind](results, before, title))


def _measure_collectives(
    options: _Options, world: MPI.Intracomm, _: zerompi.Topology
) -> Sequence[Any]:
    measures: list[Callable[..., list[Any]]] = [collectives_bench.measure]
    if options.device == "cuda":
        agree(world, lambda: zerompi.use_device(world, share=options.share_devices))
        measures.append(device_bench.measure)
    return [
        result
        for name in options.collectives.split(",")
        for kind in options.dtypes.split(",")
        for size in options.sizes.split(",")
        for measure in measures
        for result in measure(world, name, _nbytes(size), getattr(torch, kind), options.repeats)
    ]


def _measure_training(
    options: _Options, world: MPI.Intracomm, topology: zerompi.Topology
) -> Sequence[Any]:
    names = agree_on_root(world, lambda: _systems(options, topology))
    link = None if options.link is None else options.link * 1e9 / 8
    return training_bench.measure(world, options.workload, names, options.repeats, link)


def _measure_checkpoints(
    options: _Options, world: MPI.Intracomm, topology: zerompi.Topology
) -> Sequence[Any]:
    names = _systems(options, topology)
    return checkpoints_bench.measure(
        world, options.workload, names, options.repeats, Path(options.directory)
    )


def _systems(options: _Options, topology: zerompi.Topology) -> list[str]:
    if options.systems is not None:
        return options.systems.split(",")
    return (
        list(checkpoints_bench.SYSTEMS)
        if options.kind == "checkpoint"
        else training_bench.worthwhile(topology)
    )


_MEASURE: dict[str, Callable[[_Options, MPI.Intracomm, zerompi.Topology], Sequence[Any]]] = {
    "collectives": _measure_collectives,
    "training": _measure_training,
    "checkpoint": _measure_checkpoints,
}
_TABLE: dict[str, Callable[..., Any]] = {
    "collectives": table_of_collectives,
    "training": table_of_training,
    "checkpoint": table_of_checkpoints,
}
_PLOT: dict[str, Callable[..., None]] = {
    "collectives": plot_collectives,
    "training": plot_training,
    "checkpoint": plot_checkpoints,
}


# -- options -----------------------------------------------------------------------------------


def _check(options: _Options, topology: zerompi.Topology) -> None:
    _chosen("KIND", options.kind, KINDS)
    _chosen("--collectives", options.collectives, collectives_bench.COLLECTIVES)
    if options.device not in _DEVICES:
        raise InputError(f"--device: expected {' or '.join(_DEVICES)}, got {options.device!r}")
    if options.device == "cuda" and options.kind != "collectives":
        raise InputError(f"--device: expected cpu to measure {options.kind}, got cuda")
    _chosen("--dtypes", options.dtypes, _DTYPES)
    for size in options.sizes.split(","):
        _nbytes(size)
    if options.systems is not None and options.kind == "checkpoint":
        _chosen("--systems", options.systems, list(checkpoints_bench.SYSTEMS))
    elif options.systems is not None:
        _chosen("--systems", options.systems, list(training_bench.SYSTEMS))
        _chosen("--systems", options.systems, training_bench.available(topology))
    if options.kind == "training" and any(
        name.startswith("deepspeed") for name in _systems(options, topology)
    ):
        lock = training_bench.locked_build()
        if lock is not None:
            raise InputError(
                f"--systems: DeepSpeed would wait for a build of its operators: remove {lock} if none runs"
            )
    if options.workload.fused and options.kind != "training":
        raise InputError(f"--fused: expected to measure training, got {options.kind}")
    if options.link is not None and not options.link > 0:
        raise InputError(f"--link: expected more than 0 Gbit/s, got {options.link:g}")
    if not os.access(options.directory, os.W_OK):
        raise InputError(f"--directory: expected one to write to, got {options.directory}")
    counts = {**vars(options.workload), "repeats": options.repeats}
    counts.pop("fused")
    for name, value in counts.items():
        if value < 1:
            raise InputError(f"--{name}: expected at least 1, got {value}")
    workload = options.workload
    if workload.width % (2 * workload.heads):
        half = workload.width / 2
        raise InputError(
            f"--heads: expected a divisor of --width / 2 = {half:g}, got {workload.heads}"
        )
    if options.table is not None and options.kind != "collectives":
        raise InputError("--table: expected to measure collectives, got training")
    if options.plot is not None and importlib.util.find_spec("matplotlib") is None:
        raise InputError("--plot: expected matplotlib to be installed: pip install matplotlib")


def _chosen(option: str, text: str, known: Sequence[str]) -> None:
    for name in text.split(","):
        if name not in known:
            raise InputError(f"{option}: expected some of {', '.join(known)}, got {name!r}")


def _nbytes(size: str) -> int:
    number, unit = size[:-3], size[-3:]
    if unit in UNITS and number.isdigit() and 0 < int(number) * UNITS[unit] <= 1 << 30:
        return int(number) * UNITS[unit]
    raise InputError(f"--sizes: expected sizes such as 64KiB or 16MiB, up to 1GiB, got {size!r}")


# -- files -------------------------------------------------------------------------------------


def _read(path: str | None) -> dict[str, float]:
    """Seconds of an earlier run by key."""
    if path is None:
        return {}
    try:
        rows = json.loads(Path(path).read_text())["results"]
        return {str(row["key"]): float(row["seconds"]) for row in rows}
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"--compare: {path}: expected results of zerompi bench") from error


def _write(options: _Options, results: Sequence[Any], topology: zerompi.Topology) -> None:
    if options.out is None:
        return
    content = {
        "kind": options.kind,
        "zerompi": zerompi.__version__,
        "torch": torch.__version__,
        "mpi": MPI.Get_library_version().strip("\0").splitlines()[0],
        "ranks": topology.size,
        "nodes": topology.num_nodes,
        "threads": torch.get_num_threads(),
        "workload": None if options.kind == "collectives" else vars(options.workload),
        "results": [{"key": result.key, **asdict(result)} for result in results],
    }
    Path(options.out).write_text(json.dumps(content, indent=2) + "\n")


def _add_to_table(path: Path, rows: Sequence[Row]) -> None:
    if not rows:
        raise InputError(
            "--table: expected several nodes of several ranks, where there is a choice"
        )
    try:
        write_table(path, rows)
    except ValueError as error:
        raise InputError(f"--table: {error}") from error


def _plot(kind: str, results: Sequence[Any], title: str, path: Path) -> None:
    try:
        _PLOT[kind](results, title, path)
    except ValueError as error:  # an ending that matplotlib does not know
        raise InputError(f"--plot: {path}: {error}") from error
