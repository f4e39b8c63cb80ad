"""The documentation builds without a warning and without a network."""

from __future__ import annotations

import pytest

from harness.mpirun import ROOT


def test_documentation_builds_without_warnings(run_mpi, tmp_path):
    for package in ("sphinx", "myst_parser", "furo"):
        pytest.importorskip(package, reason=f"{package} is not installed: extra docs")
    job = run_mpi(
        1,
        ["-m", "sphinx", "-W", "--keep-going", "-q", ROOT / "docs", tmp_path],
        env={"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"},
    )
    assert job.returncode == 0, job.output
