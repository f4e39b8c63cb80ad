"""`zerompi info --probe`: whether MPI can send memory of devices, found out without dying of it."""

from __future__ import annotations

import pytest

from harness.memory import HAS_DEVICE, WITHOUT_DEVICE
from zerompi.cli.probe import probe


def test_info_tells_of_devices_and_their_transport(run_mpi):
    job = run_mpi(1, ["-m", "zerompi", "info"], env={"ZEROMPI_DEVICE_TRANSPORT": "staged"})
    assert job.returncode == 0, job.output
    assert "devices of rank 0" in job.stdout
    assert "staged: ZEROMPI_DEVICE_TRANSPORT says so" in job.stdout


def test_the_probe_wants_a_single_process(run_mpi):
    job = run_mpi(2, ["-m", "zerompi", "info", "--probe"])
    assert job.returncode != 0
    assert "error: --probe: expected a single process" in job.stderr


@pytest.mark.usefixtures("run_mpi")
def test_a_launcher_that_does_not_start_is_told():
    assert probe("no-such-launcher -n 2").startswith("not tried: no-such-launcher did not start")


@pytest.mark.usefixtures("run_mpi")
def test_a_job_that_dies_is_an_answer():
    assert probe("false") == "no: the job ended with status 1"


@pytest.mark.skipif(HAS_DEVICE, reason="needs a machine without a device")
def test_without_a_device_nothing_is_tried(run_mpi):
    job = run_mpi(1, ["-m", "zerompi", "info", "--probe"])
    assert "not tried: 2 ranks see [0, 0] devices" in " ".join(job.stdout.split())


@pytest.mark.skipif(not HAS_DEVICE, reason=WITHOUT_DEVICE)
@pytest.mark.parametrize(
    ("protected", "answer"), [("0", "yes: messages between devices arrived"), ("1", "no: ")]
)
@pytest.mark.usefixtures("run_mpi")
def test_the_probe_tells_whether_mpi_reads_an_emulated_device(monkeypatch, protected, answer):
    """With protected pages an access of the host's kills the job, as on most real ones."""
    monkeypatch.setenv("CUEMU_PROTECT", protected)
    assert probe(None).startswith(answer)
