"""Jobs of `zerompi train` with a model so small that a job takes seconds."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from harness.commands import CommandRun
from harness.mpirun import MPIRun

TINY = {
    "layers": 2,
    "width": 32,
    "heads": 2,
    "context": 16,
    "batch": 8,
    "lr": 0.01,
    "warmup": 2,
    "steps": 6,
    "eval-every": 3,
    "eval-batches": 3,
    "sample": 4,
    "progress": "lines",  # a fork does not find the launcher that would tell whether there is a terminal
}


class TrainRun(NamedTuple):
    """A job, or a command in this one, that has ended; and where it wrote."""

    job: MPIRun | CommandRun
    out: Path

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl."""
        return [json.loads(line) for line in (self.out / "metrics.jsonl").read_text().splitlines()]

    @property
    def losses(self) -> list[tuple[str, int, float]]:
        """Kind, step and loss of each line."""
        return [(line["kind"], line["step"], line["loss"]) for line in self.metrics]

    @property
    def summary(self) -> dict[str, Any]:
        """summary.json."""
        return json.loads((self.out / "summary.json").read_text())


def options(values: Mapping[str, Any]) -> list[str]:
    """Command-line options; None leaves one out, True gives none a value."""
    words = []
    for name, value in values.items():
        if value is not None:
            words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return words


@pytest.fixture
def train_here(command: Callable[..., CommandRun], shared_path: Path) -> Callable[..., TrainRun]:
    """`train_here(**options)` trains on the ranks of the tests. Collective."""

    def run(**changes: Any) -> TrainRun:
        named = {name.replace("_", "-"): value for name, value in changes.items()}
        ended = command("train", *options({**TINY, **named, "out": shared_path / "out"}))
        assert ended.status == 0, ended
        return TrainRun(ended, shared_path / "out")

    return run


@pytest.fixture
def train(run_mpi: Callable[..., MPIRun], tmp_path: Path) -> Callable[..., TrainRun]:
    """`train(ranks, out, **options)` runs a tiny job to its end, by a script instead of the command."""

    def run(
        ranks: int, out: str = "out", *, script: Path | None = None, **changes: Any
    ) -> TrainRun:
        named = {name.replace("_", "-"): value for name, value in changes.items()}
        words = options({**TINY, **named, "out": tmp_path / out})
        program = ["-m", "zerompi"] if script is None else [script]
        job = run_mpi(ranks, [*program, "train", *words])
        assert job.returncode == 0, job.output
        return TrainRun(job, tmp_path / out)

    return run
