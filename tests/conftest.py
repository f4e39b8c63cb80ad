"""Fixtures; the plugin in harness/ranks.py makes the ranks of one pytest run agree."""

from __future__ import annotations

import gc
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from zlib import crc32

import hypothesis
import pytest

import zerompi  # noqa: F401  (prepares the environment of MPI)

from mpi4py import MPI  # isort: skip

from harness import ranks
from harness.commands import CommandRun
from harness.cover import ALONE, Sharing, cases_left_out
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
    """`--part K/N` runs one of N parts of the tests, `--shared K/N` some cases of each test.

    The N runs together run everything. With `:DIRECTORY`, only what is there is divided.
    """
    for option, what in (
        ("--part", "one of N parts of the tests"),
        ("--shared", "a share of the cases of each test (harness/cover.py)"),
    ):
        parser.addoption(option, default="1/1", help=f"run {what}: K/N[:DIRECTORY]")


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """Collections of garbage by tests need not look at all that was imported, also by the first optimizer."""
    import torch._dynamo  # noqa: F401

    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out cases (harness/cover.py), what needs no ranks, and tests of other parts; all ranks alike."""
    world = f"{MPI.get_vendor()[0]}, {MPI.COMM_WORLD.size} ranks"
    sharing, shared_items = _some_of(config, "--shared", items)
    # Other cases elsewhere; but what runs share is whole only if they divide the same.
    place = os.environ.get("ZEROMPI_DEVICE_TRANSPORT") if ON_DEVICE else "host"
    others = [item for item in items if item not in shared_items]
    left_out = cases_left_out(others, f"{world}, {place}")
    left_out |= cases_left_out(
        [item for item in items if item in shared_items], f"{world}, shared", sharing
    )
    if MPI.COMM_WORLD.size > 1:
        left_out |= {item for item in items if item.path.parent.name in _ON_ONE_RANK}
    part, divided = _some_of(config, "--part", items)
    # Not by position, which goes with the stage.
    left_out |= {item for item in divided if crc32(item.nodeid.encode()) % part.runs != part.run}
    config.hook.pytest_deselected(items=[item for item in items if item in left_out])
    items[:] = [item for item in items if item not in left_out]


def _some_of(
    config: pytest.Config, option: str, items: list[pytest.Item]
) -> tuple[Sharing, set[pytest.Item]]:
    """Which run this is, and the items that the runs divide, by an option of the form K/N[:DIRECTORY]."""
    value = config.getoption(option)
    match = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)(?::(.+))?", value)
    place = config.rootpath / ((match and match[3]) or "")
    if not match or int(match[1]) > int(match[2]) or not place.is_dir():
        raise pytest.UsageError(
            f"{option}: expected K/N or K/N:DIRECTORY with K from 1 to N, got {value}"
        )
    sharing = Sharing(int(match[1]) - 1, int(match[2]))
    divided = {item for item in items if place in item.path.parents}
    return sharing, set() if sharing == ALONE else divided


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
