"""Suites of tests' own, run on ranks of their own."""

from __future__ import annotations

import shutil
import textwrap

import pytest

from harness.mpirun import ROOT

HEAD = """
import time
import pytest
from mpi4py import MPI
WORLD = MPI.COMM_WORLD
LAST = WORLD.rank == WORLD.size - 1
"""


@pytest.fixture
def run_suite(run_mpi, tmp_path):
    """Run the tests in `source` on `ranks` ranks under our own conftest."""

    def run(source, ranks=2, timeout=30, program=("-m", "pytest")):
        shutil.copy(ROOT / "tests" / "conftest.py", tmp_path)
        (tmp_path / "pytest.ini").write_text(f"[pytest]\ntimeout = {timeout}\n")
        (tmp_path / "test_suite.py").write_text(HEAD + textwrap.dedent(source))
        path = f"{ROOT}:{ROOT / 'tests'}"
        return run_mpi(
            ranks,
            [*program, "--color=no", "-p", "no:cacheprovider", tmp_path],
            cwd=tmp_path,
            timeout=150,
            env={"PYTHONPATH": path},
        )

    return run
