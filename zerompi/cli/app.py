"""The commands and their errors."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import typer
from mpi4py import MPI

import zerompi
from zerompi.cli.info import info
from zerompi.cli.train import add_missing_value, train
from zerompi.errors import ZerompiError
from zerompi.launch import check_world
from zerompi.train.config import InputError

app = typer.Typer(
    name="zerompi",
    help="ZeRO training of PyTorch models over MPI.",
    epilog="Example: mpiexec -n 4 zerompi train",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(epilog="Example: mpiexec -n 4 zerompi train --data my-book.txt --steps 1000")(train)
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
    """Run one command; return the exit status."""
    command = typer.main.get_command(app)
    try:
        check_world(MPI.COMM_WORLD.size)
        status = command.main(
            add_missing_value(arguments), prog_name="zerompi", standalone_mode=False
        )
    except (InputError, ZerompiError) as error:
        return _refuse(str(error))
    except typer.Abort:
        return 1
    except Exception as error:
        # Of wrong usage; by version, typer carries the class itself or takes it from click.
        format_message = getattr(error, "format_message", None)
        if format_message is None:
            raise
        return _refuse(format_message()) if format_message() else 2
    return status if isinstance(status, int) else 0


def _refuse(message: str) -> int:
    if MPI.COMM_WORLD.rank == 0:
        print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    return 2
