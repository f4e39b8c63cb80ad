"""Saving and loading beside torch.distributed.checkpoint, torch.save and the bare disk."""

from __future__ import annotations

import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from mpi4py import MPI
from torch import nn

import zerompi
from zerompi.bench.gloo import gloo
from zerompi.bench.training import Workload, make_fsdp2_model, peak_while, resident_nbytes

DISK = "disk"
_OWN = "zerompi"
_PIECE = 4 << 20  # bytes of one write
_QUIET = (
    0.5  # seconds in which the disk ends what it does unasked, such as discarding removed files
)


@dataclass(frozen=True)
class Stored:
    """What one system did.

    Attributes:
        system: its name.
        nbytes: of the files, all ranks together.
        seconds: of a save until it is on the disk (fsync), the slowest rank's; the median of the
            repetitions.
        pause: seconds until training may go on; the same.
        first_pause: the same of the first save, which finds no memory for copies.
        load: seconds of a load, the files not in the page cache; None for the bare disk.
        save_memory: by how much the memory of all ranks has grown at the peak of a save, bytes by
            rank on average; shared pages count once (PSS).
        load_memory: the same of a load.
        ratio: the median over rounds of `seconds` by those of `zerompi` in the same round; None if
            that takes no part.
    """

    system: str
    nbytes: int
    seconds: float
    pause: float
    first_pause: float
    load: float | None
    save_memory: int
    load_memory: int | None
    ratio: float | None = None

    @property
    def key(self) -> str:
        """What was measured, to find it in another run's results."""
        return f"checkpoint {self.system}"


class Storing:
    """A system that is ready to save and load.

    Args:
        save: to a path; returns when training may go on.
        load: from there; None if it cannot.
        wait: returns when what was saved is on the disk.
    """

    def __init__(
        self,
        save: Callable[[Path], object],
        load: Callable[[Path], object] | None,
        wait: Callable[[], object] = lambda: None,
    ) -> None:
        self.save = save
        self.load = load
        self.wait = wait


Maker = Callable[[Workload, MPI.Intracomm], AbstractContextManager[Storing]]


# -- systems -----------------------------------------------------------------------------------


def _trained(workload: Workload, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """One step, so that the optimizer has its states."""
    x, _ = workload.make_batch(0)
    model(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


@contextmanager
def _disk(workload: Workload, comm: MPI.Intracomm) -> Iterator[Storing]:
    """As many bytes as weights and two states of AdamW, each rank its part of one file."""
    numel = sum(parameter.numel() for parameter in workload.make_model().parameters())
    own = torch.randint(0, 256, (12 * numel // comm.size,), dtype=torch.uint8).numpy().data

    def save(path: Path) -> None:
        if comm.rank == 0:
            path.mkdir()
            (path / "bytes").touch()
        comm.Barrier()
        descriptor = os.open(path / "bytes", os.O_WRONLY)
        for start in range(0, len(own), _PIECE):
            os.pwrite(descriptor, own[start : start + _PIECE], comm.rank * len(own) + start)
        os.fsync(descriptor)
        os.close(descriptor)

    yield Storing(save, None)


@contextmanager
def _zerompi(workload: Workload, comm: MPI.Intracomm, *, blocking: bool) -> Iterator[Storing]:
    model = workload.make_model()
    optimizer = workload.make_optimizer(model)
    with zerompi.partition(model, optimizer, comm=comm) as zero:
        _trained(workload, model, optimizer)
        yield Storing(partial(zero.save, blocking=blocking), zero.load, zero.wait_for_save)


@contextmanager
def _distributed(workload: Workload, comm: MPI.Intracomm) -> Iterator[Storing]:
    """FSDP2 with torch.distributed.checkpoint, which calls fsync by itself."""
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
    from torch.distributed.checkpoint.state_dict_loader import load as load_into
    from torch.distributed.checkpoint.state_dict_saver import save as save_from

    model = make_fsdp2_model(workload, comm)
    optimizer = workload.make_optimizer(model)
    _trained(workload, model, optimizer)

    def state() -> dict[str, Any]:
        of_model, of_optimizer = get_state_dict(model, optimizer)
        return {"model": of_model, "optimizer": of_optimizer}

    def save(path: Path) -> None:
        save_from(state(), storage_writer=FileSystemWriter(path, sync_files=True))

    def load(path: Path) -> None:
        loaded = state()
        load_into(loaded, checkpoint_id=path)
        set_state_dict(
            model,
            optimizer,
            model_state_dict=loaded["model"],
            optim_state_dict=loaded["optimizer"],
        )

    yield Storing(save, load)


@contextmanager
def _whole(workload: Workload, comm: MPI.Intracomm) -> Iterator[Storing]:
    """torch.save and torch.load of the whole state, on rank 0 alone; the others wait."""
    if comm.rank != 0:
        yield Storing(lambda path: None, lambda path: None)
        return
    model = workload.make_model()
    optimizer = workload.make_optimizer(model)
    _trained(workload, model, optimizer)

    def save(path: Path) -> None:
        path.mkdir()
        with open(path / "state.pt", "wb") as stream:
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, stream)
            stream.flush()
            os.fsync(stream.fileno())

    def load(path: Path) -> None:
        loaded = torch.load(path / "state.pt", weights_only=True)
        model.load_state_dict(loaded["model"])
        optimizer.load_state_dict(loaded["optimizer"])

    yield Storing(save, load)


SYSTEMS: dict[str, Maker] = {
    DISK: _disk,
    "zerompi": partial(_zerompi, blocking=True),
    "zerompi-background": partial(_zerompi, blocking=False),
    "dcp": _distributed,
    "torch.save": _whole,
}


# -- measurement -------------------------------------------------------------------------------


def measure(
    comm: MPI.Intracomm, workload: Workload, systems: list[str], repeats: int, directory: Path
) -> list[Stored]:
    """Let the systems take turns, in `directory`, which all ranks share. Collective over `comm`.

    In an order of its own in each round, so that none always follows the same other one.
    """
    place = Path(comm.bcast(tempfile.mkdtemp(dir=directory) if comm.rank == 0 else None))
    turns: dict[str, list[Turn]] = {name: [] for name in systems}
    weights: dict[str, Weight] = {}
    try:
        with gloo(comm):
            for turn in range(repeats):
                for name in random.Random(turn).sample(systems, len(systems)):
                    turns[name].append(_take_turn(comm, workload, name, place))
            for name in systems:
                weights[name] = _weigh(comm, workload, name, place)
    finally:
        if comm.rank == 0:
            shutil.rmtree(place, ignore_errors=True)
    return [_stored(name, taken, weights[name], turns.get(_OWN)) for name, taken in turns.items()]


class Turn(NamedTuple):
    """Of one save and load: seconds of the slowest rank, and bytes of the files."""

    first_pause: float
    pause: float
    seconds: float
    load: float | None
    nbytes: int


class Weight(NamedTuple):
    """By how much a save and a load let memory grow: bytes by rank on average."""

    save: int
    load: int | None


def _stored(name: str, turns: list[Turn], weight: Weight, own: list[Turn] | None) -> Stored:
    loads = [turn.load for turn in turns if turn.load is not None]
    ratio = None
    if own is not None:
        ratio = median(a.seconds / b.seconds for a, b in zip(turns, own, strict=True))
    return Stored(
        name,
        turns[-1].nbytes,
        median(turn.seconds for turn in turns),
        median(turn.pause for turn in turns),
        median(turn.first_pause for turn in turns),
        median(loads) if loads else None,
        *weight,
        ratio=ratio,
    )


def _take_turn(comm: MPI.Intracomm, workload: Workload, name: str, place: Path) -> Turn:
    """Save twice, and load the second from the disk."""
    with SYSTEMS[name](workload, comm) as storing:
        first_pause, _ = _time_save(comm, storing, place / "first")
        _remove(comm, place / "first")
        pause, seconds = _time_save(comm, storing, place / "second")
        load = None
        if storing.load is not None:
            _evict(comm, place / "second")
            start = time.perf_counter()
            storing.load(place / "second")
            comm.Barrier()
            load = comm.allreduce(time.perf_counter() - start, MPI.MAX)
        nbytes = sum(file.stat().st_size for file in (place / "second").iterdir())
    _remove(comm, place / "second")
    return Turn(first_pause, pause, seconds, load, nbytes)


def _time_save(comm: MPI.Intracomm, storing: Storing, path: Path) -> tuple[float, float]:
    """Save; return seconds until training may go on, and until all is on the disk."""
    _settle(comm)
    start = time.perf_counter()
    storing.save(path)
    pause = time.perf_counter() - start
    storing.wait()
    comm.Barrier()
    seconds = time.perf_counter() - start
    return comm.allreduce(pause, MPI.MAX), comm.allreduce(seconds, MPI.MAX)


def _weigh(comm: MPI.Intracomm, workload: Workload, name: str, place: Path) -> Weight:
    """Save and load for the first time, under observation."""
    path = place / "weighed"
    with SYSTEMS[name](workload, comm) as storing:
        save = _peak(comm, lambda: (storing.save(path), storing.wait()))
        load = None if storing.load is None else _peak(comm, partial(storing.load, path))
    _remove(comm, path)
    return Weight(save, load)


def _remove(comm: MPI.Intracomm, path: Path) -> None:
    """Remove the files when all ranks are done with them."""
    comm.Barrier()
    if comm.rank == 0:
        shutil.rmtree(path)
    comm.Barrier()


def _peak(comm: MPI.Intracomm, work: Callable[[], object]) -> int:
    before = resident_nbytes(comm)
    return (peak_while(comm, work) - before) // comm.size


def _settle(comm: MPI.Intracomm) -> None:
    """Nothing of what was written before is on its way to the disk."""
    if comm.rank == 0:
        os.sync()
        time.sleep(_QUIET)
    comm.Barrier()


def _evict(comm: MPI.Intracomm, path: Path) -> None:
    """Take the files out of this node's page cache."""
    for file in path.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    comm.Barrier()
