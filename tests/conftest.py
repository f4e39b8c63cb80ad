"""Fixtures; the plugin in harness/ranks.py makes the ranks of one pytest run agree."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import hypothesis
import pytest

import zerompi  # noqa: F401  (prepares the environment of MPI)

from mpi4py import MPI  # isort: skip

from harness import ranks
from harness.mpirun import MPIRun

# Ranks must draw the same examples: they meet in collectives. No deadline: ranks share cores.
hypothesis.settings.register_profile(
    "ranks", derandomize=MPI.COMM_WORLD.size > 1, database=None, deadline=None
)
hypothesis.settings.load_profile("ranks")


# Models of tests are so small that all their blocks would go the flat way.
os.environ.setdefault("ZEROMPI_ALGORITHM", "hierarchical")


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    """Join the ranks, once the terminal reporter is there."""
    if MPI.COMM_WORLD.size > 1:
        config.pluginmanager.register(ranks.RankAgreement(config), "rank-agreement")


@pytest.fixture
def comm() -> Iterator[MPI.Intracomm]:
    """A fresh duplicate of COMM_WORLD."""
    duplicate = MPI.COMM_WORLD.Dup()
    yield duplicate
    duplicate.Free()


@pytest.fixture
def run_mpi() -> Callable[..., MPIRun]:
    """`run_mpi(ranks, arguments)` starts a job of its own; skips if pytest has several ranks."""
    if MPI.COMM_WORLD.size > 1:
        pytest.skip("starts jobs of its own: run pytest with one rank")
    return MPIRun.run
