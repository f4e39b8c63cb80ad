"""Results of benchmarks as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.table import Table

from zerompi.bench.checkpoints import Stored
from zerompi.bench.collectives import COPY, Result
from zerompi.bench.training import Trained

UNITS = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


def table_of_collectives(
    results: Sequence[Result], before: Mapping[str, float], title: str
) -> Table:
    """One row for each way; bandwidth is the buffer's bytes by the time, for a copy twice that.

    Args:
        results: in the order in which they are shown.
        before: seconds of an earlier run by key; empty if there was none.
        title: of the table.
    """
    columns = ["collective", "dtype", "size", "way", "time", "GB/s", "faster than MPI"]
    table = Table(*columns, *(["before"] if before else []), title=title)
    last = None
    for result in results:
        group = (result.collective, result.dtype, result.nbytes)
        if last not in (None, group):
            table.add_section()
        last = group
        moved = result.nbytes * (2 if result.way.endswith(COPY) else 1)
        row = [
            result.collective,
            result.dtype,
            size_text(result.nbytes),
            result.way,
            _time(result.seconds),
            f"{moved / result.seconds / 1e9:.2f}",
            "" if result.ratio is None else f"{result.ratio:.2f}x",
        ]
        table.add_row(*row, *_before(result, before))
    return table


def table_of_training(results: Sequence[Trained], before: Mapping[str, float], title: str) -> Table:
    """One row for each system; see `table_of_collectives`.

    Milliseconds (`step`, `CPU`), megabytes (`peak`, `held`, `report`, and what a node has `sent` to others), and
    ratios (`free`, `bound`). No number is cut at 80 columns.
    """
    sends = any(result.sent for result in results)
    is_bounded = any(result.of_bound is not None for result in results)
    names = ["step", "free", "CPU", "peak", "held", "report", "loss"]
    table = _narrow_table([*names, *["sent"] * sends, *["bound"] * is_bounded], before, title)
    for result in results:
        row = [
            f"{result.seconds * 1e3:.1f}",
            f"{result.ratio:.2f}",
            f"{result.processor * 1e3:.0f}",
            _megabytes(result.peak),
            _megabytes(result.held),
            _megabytes(result.reported),
            "" if result.loss is None else f"{result.loss:.5f}",
        ]
        row += [_megabytes(result.sent)] * sends
        row += ["" if result.of_bound is None else f"{result.of_bound:.2f}"] * is_bounded
        table.add_row(result.system, *row, *_before(result, before))
    return table


def table_of_checkpoints(
    results: Sequence[Stored], before: Mapping[str, float], title: str
) -> Table:
    """One row for each system; see `table_of_collectives`.

    GB of the files, seconds, the save's by those of zerompi in the same round (`ratio`), and MB by rank
    (`save+`, `load+`). No number is cut at 80 columns.
    """
    names = ["GB", "save", "ratio", "pause", "first", "load", "GB/s", "save+", "load+"]
    table = _narrow_table(names, before, title)
    for result in results:
        loads = result.load is not None and result.load_memory is not None
        row = [
            result.system,
            f"{result.nbytes / 1e9:.2f}",
            f"{result.seconds:.2f}",
            "" if result.ratio is None else f"{result.ratio:.2f}",
            f"{result.pause:.2f}",
            f"{result.first_pause:.2f}",
            f"{result.load or 0:.2f}" if loads else "",
            f"{result.nbytes / (result.load or 1) / 1e9:.2f}" if loads else "",
            _megabytes(result.save_memory),
            _megabytes(result.load_memory if loads else None),
        ]
        table.add_row(*row, *_before(result, before))
    return table


def _narrow_table(numbers: Sequence[str], before: Mapping[str, float], title: str) -> Table:
    """Of systems, whose names fold, and columns of numbers, which do not; the last one for `_before`."""
    table = Table(title=title, collapse_padding=True, pad_edge=False)
    table.add_column("system", overflow="fold")
    for name in [*numbers, *["before"] * bool(before)]:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _megabytes(nbytes: int | None) -> str:
    return "" if nbytes is None else f"{nbytes / 1e6:.0f}"


def _before(result: Result | Trained | Stored, before: Mapping[str, float]) -> list[str]:
    if not before:
        return []
    seconds = before.get(result.key)
    return ["" if seconds is None else f"{seconds / result.seconds:.2f}x"]


def size_text(nbytes: int) -> str:
    """A number of bytes for people."""
    for unit, size in reversed(UNITS.items()):
        if nbytes >= size:
            return f"{nbytes / size:.4g} {unit}"
    return f"{nbytes} B"


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:,.0f} us" if seconds < 1e-3 else f"{seconds * 1e3:,.2f} ms"
