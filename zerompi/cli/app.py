"""The commands and their errors."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import typer
from mpi4py import MPI

import zerompi
from zerompi.cli.bench import bench
from zerompi.cli.info import info
from zerompi.cli.train import add_missing_value, train
from zerompi.launch import check_world
from zerompi.train.agreement import agree
from zerompi.train.config import InputError

app = typer.Typer(
    name="zerompi",
    help="ZeRO training of PyTorch models over MPI.",
    epilog="Example: mpiexec -n 4 zerompi train",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(epilog="Example: mpiexec -n 4 zerompi train --data my-book.txt --steps 1000")(train)
app.command(epilog="Example: mpiexec -n 4 zerompi bench training --width 1024")(bench)
app.command(epilog="Example: mpiexec -n 4 zerompi info")(info)


def _show_version(value: bool) -> None:
    if value:
        print(f"zerompi {zerompi.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(
        False, "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
    ),
) -> None:
    """ZeRO training of PyTorch models over MPI."""


def run(arguments: Sequence[str]) -> int:
    """Run one command; return the exit status. Collective over COMM_WORLD."""
    world = MPI.COMM_WORLD
    try:
        action = agree(world, lambda: _parse(arguments or ["--help"]))
        if action is not None:
            return action() or 0
    except (InputError, zerompi.NonFiniteError) as error:  # the same on all ranks
        if world.rank == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 2 if isinstance(error, InputError) else 1
    return 0


def _parse(arguments: Sequence[str]) -> Callable[[], int | None] | None:
    """What the arguments ask to run; None if they asked for help, which has been shown.

    Raises:
        InputError: wrong usage.
        ZerompiError: the launcher and the MPI library do not fit together.
    """
    check_world(MPI.COMM_WORLD.size)
    command = typer.main.get_command(app)
    try:
        result = command.main(
            add_missing_value(arguments), prog_name="zerompi", standalone_mode=False
        )
    except Exception as error:
        # Of wrong usage; by version, typer carries the class itself or takes it from click.
        format_message = getattr(error, "format_message", None)
        if format_message is None:
            raise
        raise InputError(format_message()) from None
    return result if callable(result) else None
