"""`zerompi train`: one option for each field of TrainConfig."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, Optional

import typer
from mpi4py import MPI

from zerompi.launch import STOPPED_STATUS, abort, is_out_of_memory
from zerompi.train.config import TrainConfig, field_types, make_config, option_name, read_toml

_HELP = """Train a language model on text.

Without options: a byte-level GPT on the documentation that every Python carries, its last tenth
held out. Every option can also stand in a TOML file given with --config, under the same name; the
command line wins. SIGTERM, SIGUSR1, SIGUSR2 and the end of the time save a checkpoint and end the
run with status 75; the same command with --resume goes on.
"""


def _run(options: dict[str, Any]) -> int:
    """Train; return the exit status."""
    # Imported here so that --help is quick.
    from zerompi.train.agreement import agree
    from zerompi.train.loop import train as run_job

    try:
        config = agree(MPI.COMM_WORLD, lambda: _configure(**options))
        summary = run_job(config, MPI.COMM_WORLD)
    except (MemoryError, RuntimeError, OSError) as error:
        _end_if_out_of_memory(error)
        raise
    return STOPPED_STATUS if summary is None else 0


def _configure(config: str | None, **options: Any) -> TrainConfig:
    return make_config(options, None if config is None else read_toml(Path(config)))


def _end_if_out_of_memory(error: BaseException) -> None:
    """End the job with one line if that is what happened; the other ranks cannot be asked now."""
    if not is_out_of_memory(error):
        return
    world = MPI.COMM_WORLD
    said = str(error).strip().splitlines()
    detail = f" ({said[0]})" if said else ""
    text = (
        f"error: rank {world.rank}: out of memory{detail}: try --stage 3, more ranks, --dtype "
        "bfloat16, a smaller --batch with --accumulate, or --checkpoint-activations\n"
    )
    if world.size == 1:
        sys.stderr.write(text)
        sys.exit(1)
    abort(text)


def _command() -> Callable[..., Callable[[], int]]:
    """A function with the signature from which typer makes the options; it returns what to run."""
    defaults = TrainConfig()
    parameters = [
        _parameter("config", str, "Configuration", "TOML file with any of the options below.")
    ]
    kinds = field_types()
    for entry in fields(TrainConfig):
        text, default = entry.metadata["help"], getattr(defaults, entry.name)
        if default is not None and default is not False:
            text += f" (default: {default})"
        parameters.append(_parameter(entry.name, kinds[entry.name], entry.metadata["panel"], text))

    def train(**options: Any) -> Callable[[], int]:
        return partial(_run, options)

    train.__doc__ = _HELP
    train.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    train.__annotations__ = {p.name: p.annotation for p in parameters}
    return train


def _parameter(name: str, kind: type, panel: str, text: str) -> inspect.Parameter:
    flags = [option_name(name)]
    if kind is bool:
        flags = [f"{flags[0]}/--no-{flags[0][2:]}"]
    option = typer.Option(None, *flags, help=text, rich_help_panel=panel, show_default=False)
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=option,
        annotation=Optional[kind],  # noqa: UP045 (built at run time)
    )


def add_missing_value(arguments: Sequence[str]) -> list[str]:
    """`--resume` without a value means the latest checkpoint."""
    complete = []
    for argument, following in zip(arguments, [*arguments[1:], "-"], strict=True):
        complete.append(argument)
        if argument == "--resume" and following.startswith("-"):
            complete.append("latest")
    return complete


train = _command()
