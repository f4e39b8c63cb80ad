"""Fixtures; the plugin in harness/ranks.py makes the ranks of one pytest run agree."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from zlib import crc32

import hypothesis
import pytest

import zerompi  # noqa: F401  (prepares the environment of MPI)

from mpi4py import MPI  # isort: skip

from harness import ranks
from harness.commands import CommandRun
from harness.cover import cases_left_out
from harness.memory import ON_DEVICE
from harness.mpirun import MPIRun

# Ranks must draw the same examples: they meet in collectives. No deadline: ranks share cores.
hypothesis.settings.register_profile(
    "ranks", derandomize=MPI.COMM_WORLD.size > 1, database=None, deadline=None
)
hypothesis.settings.load_profile("ranks")


# Models of tests are so small that all their blocks would go the flat way.
os.environ.setdefault("ZEROMPI_ALGORITHM", "hierarchical")

# Tests there communicate with nobody, or start jobs of their own.
_ON_ONE_RANK = frozenset({"docs", "harness", "jobscripts", "kernels", "pure"})


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    """Join the ranks, once the terminal reporter is there."""
    if MPI.COMM_WORLD.size > 1:
        config.pluginmanager.register(ranks.RankAgreement(config), "rank-agreement")


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--part K/N`: one of N runs that together run everything; with `:DIRECTORY`, only of what is there."""
    parser.addoption(
        "--part", default="1/1", help="run some of N parts of the tests: K[+L...]/N[:DIRECTORY]"
    )


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """Collections of garbage by tests need not look at all that was imported, also by the first optimizer."""
    import torch._dynamo  # noqa: F401

    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out cases (harness/cover.py), what needs no ranks, and the tests of other parts; all ranks alike."""
    library, size = MPI.get_vendor()[0], MPI.COMM_WORLD.size
    part, _, directory = config.getoption("--part").partition(":")
    numbers, _, of = part.partition("/")
    wanted, count = {int(number) - 1 for number in numbers.split("+")}, int(of)
    divided = {
        item for item in items if count > 1 and config.rootpath / directory in item.path.parents
    }
    # Other cases elsewhere; but what is divided among transports is whole only if they divide the same.
    transport = os.environ.get("ZEROMPI_DEVICE_TRANSPORT")
    left_out = set()
    for some, way in (
        ([item for item in items if item in divided], "device"),
        ([item for item in items if item not in divided], transport),
    ):
        place = way if ON_DEVICE else "host"
        left_out |= cases_left_out(some, f"{library}, {size} ranks, {place}")
    if size > 1:
        left_out |= {item for item in items if item.path.parent.name in _ON_ONE_RANK}
    # Not by position, which goes with the stage.
    elsewhere = {item for item in divided if crc32(item.nodeid.encode()) % count not in wanted}
    config.hook.pytest_deselected(items=[*left_out, *(elsewhere - left_out)])
    items[:] = [item for item in items if item not in left_out | elsewhere]


@pytest.fixture
def comm() -> Iterator[MPI.Intracomm]:
    """A fresh duplicate of COMM_WORLD."""
    duplicate = MPI.COMM_WORLD.Dup()
    yield duplicate
    duplicate.Free()


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str]) -> Callable[..., CommandRun]:
    """`command("train", ...)` runs a command on the ranks of the tests. Collective."""
    return lambda *words: CommandRun.run(words, capfd)


@pytest.fixture
def shared_path(comm: MPI.Intracomm, tmp_path: Path) -> Path:
    """Rank 0's temporary directory, on all ranks."""
    path: Path = comm.bcast(tmp_path)
    return path


@pytest.fixture
def run_mpi() -> Callable[..., MPIRun]:
    """`run_mpi(ranks, arguments)` starts a job of its own; skips if pytest has several ranks."""
    if MPI.COMM_WORLD.size > 1:
        pytest.skip("starts jobs of its own: run pytest with one rank")
    return MPIRun.run
