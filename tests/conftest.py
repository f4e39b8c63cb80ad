"""Fixtures and the agreement of ranks on the outcome of each test."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import zerompi  # noqa: F401  (prepares the environment of MPI)

from mpi4py import MPI  # isort: skip

sys.path.insert(0, str(Path(__file__).parent))

from harness.mpirun import MPIRun  # noqa: E402

# Apart from COMM_WORLD, so that a test's own messages never mix with ours.
_control = MPI.COMM_WORLD.Dup()


@pytest.fixture
def comm() -> Iterator[MPI.Intracomm]:
    """A fresh duplicate of COMM_WORLD."""
    duplicate = MPI.COMM_WORLD.Dup()
    yield duplicate
    duplicate.Free()


@pytest.fixture
def run_mpi() -> Callable[..., MPIRun]:
    """`run_mpi(ranks, arguments)` starts a job of its own; only where pytest itself is one process."""
    if MPI.COMM_WORLD.size > 1:
        pytest.skip("starts jobs of its own: run pytest with one rank")
    return MPIRun.run


def pytest_configure(config: pytest.Config) -> None:
    """Only rank 0 writes to the terminal."""
    reporter = config.pluginmanager.getplugin("terminalreporter")
    if _control.rank and reporter is not None:
        reporter._tw._file = open("/dev/null", "w")  # noqa: SIM115


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """A test fails on all ranks if it fails on one; rank 0 shows every rank's failure."""
    report: pytest.TestReport = yield
    if _control.size > 1 and report.when == "call":
        text = str(report.longrepr) if report.failed else ""
        everywhere = _control.allgather((item.nodeid, report.outcome, text))
        if len({nodeid for nodeid, _, _ in everywhere}) > 1:
            print(f"ranks run different tests: {everywhere}", file=sys.stderr, flush=True)
            MPI.COMM_WORLD.Abort(1)
        failures = [
            f"--- rank {rank}\n{text}"
            for rank, (_, outcome, text) in enumerate(everywhere)
            if outcome == "failed"
        ]
        if failures:
            report.outcome = "failed"
            report.longrepr = "\n".join(failures)
    return report
