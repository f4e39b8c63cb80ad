"""Where a run's checkpoints lie, which are kept, and which one it continues from."""

from __future__ import annotations

from pathlib import Path

from mpi4py import MPI

from zerompi.checkpoint import find_latest, remove_leftovers
from zerompi.train import huggingface
from zerompi.train.agreement import agree, agree_on_root
from zerompi.train.config import InputError, TrainConfig
from zerompi.train.job import Job


def checkpoint_directory(config: TrainConfig) -> Path:
    """The parent of all checkpoints of a run."""
    return Path(config.out) / "checkpoints"


def save_checkpoint(job: Job, step: int, *, blocking: bool = True) -> Path:
    """Save after `step` steps, then remove what `--keep` does not keep. Collective.

    Raises:
        InputError: it, or an earlier one in the background, could not be written; the same on all ranks.
    """
    config = job.config
    path = checkpoint_directory(config) / f"step-{step}"
    extra = {
        "step": step,
        "scheduler": job.scheduler.state_dict(),
        "config": config.as_dict(),
    }
    include = [] if config.model is None else huggingface.companions(Path(config.model))
    agree(
        job.comm,
        lambda: job.zero.save(
            path, extra=extra, blocking=blocking, keep=config.keep, include=include
        ),
    )
    return path


def prepare_output(config: TrainConfig, comm: MPI.Intracomm) -> Path | None:
    """Make the output directory; return the checkpoint to continue from, or None. Collective.

    Raises:
        InputError: `--resume` names no checkpoint, or the directory holds others that this run
            would mix with, those of an earlier run or newer ones; the same on all ranks.
    """
    return agree_on_root(comm, lambda: _prepare(config))


def _prepare(config: TrainConfig) -> Path | None:
    directory = checkpoint_directory(config)
    Path(config.out).mkdir(parents=True, exist_ok=True)
    remove_leftovers(directory)
    latest = find_latest(directory)
    if config.resume is None:
        if latest is not None:
            raise InputError(
                f"--out: {config.out} has checkpoints of an earlier run; --resume continues from "
                f"{latest.name}, or choose another --out"
            )
        return None
    if config.resume in ("auto", "latest"):
        return latest
    path = Path(config.resume)
    if not (path / "state.json").is_file():
        raise InputError(f"--resume: {path}: expected a complete checkpoint, got none")
    # Else the next `--resume` would take the newest of a course that has been left.
    if latest is not None and not latest.samefile(path):
        raise InputError(
            f"--resume: {path}: expected the latest checkpoint in --out, {latest}; to continue "
            "from this one, choose another --out or remove those after it"
        )
    return path
