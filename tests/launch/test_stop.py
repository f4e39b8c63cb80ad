"""Requests to stop: signals and the end of the job's time, agreed on by all ranks."""

from __future__ import annotations

import math
import os
import re
import signal
import time

import pytest
from mpi4py import MPI

import zerompi
from zerompi.job_time import seconds_to_end

VARIABLES = ("ZEROMPI_END_TIME", "SLURM_JOB_END_TIME")


@pytest.fixture(autouse=True)
def no_batch_system(monkeypatch):
    for name in (*VARIABLES, "PBS_JOBID", "LSB_JOBID", "LSB_JOBINDEX", "FLUX_JOB_ID"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGUSR2"])
def test_a_signal_to_one_rank_stops_all(comm, name):
    before = signal.getsignal(signal.Signals[name])
    with zerompi.StopRequest() as request:
        assert not request.requested(comm)
        if comm.rank == comm.size - 1:
            os.kill(os.getpid(), signal.Signals[name])
        assert request.requested(comm)
        assert request.reason == name
    assert signal.getsignal(signal.Signals[name]) is before


def test_the_end_of_one_ranks_time_stops_all(comm):
    last = comm.rank == comm.size - 1
    request = zerompi.StopRequest(1e-9 if last else 0)
    time.sleep(0.01)
    assert request.requested(comm)
    assert request.reason == "the end of its time"


def test_time_is_kept_for_a_step_like_the_longest_and_for_the_checkpoint(monkeypatch):
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    request = zerompi.StopRequest(60, margin=10)
    seen = []
    for now in (120, 135, 136, 146):  # noqa: B007 (the clock reads it)
        seen.append(request.requested(MPI.COMM_SELF))
    # Before the first look it has trained nothing. At 136 a step of 15 s ends at 151, after 150.
    assert seen == [False, False, True, True]


@pytest.mark.parametrize(("left", "expected"), [(10_000, 9_880), (100, 95)])
def test_the_margin_is_two_minutes_or_a_part_of_a_short_time(monkeypatch, left, expected):
    monkeypatch.setattr(time, "monotonic", lambda: clock)
    clock = 0.0
    request = zerompi.StopRequest(left)
    clock = expected - 1
    assert not request.look()
    clock = expected + 1
    assert request.look()


@pytest.mark.parametrize("name", VARIABLES)
def test_the_end_is_read_from_the_batch_system(monkeypatch, name):
    monkeypatch.setenv(name, str(int(time.time()) + 100))
    assert 90 < seconds_to_end(asks=False) <= 100


@pytest.mark.parametrize("value", ["", "NONE", "1000", "inf"])
def test_an_end_that_has_passed_or_is_none_is_no_limit(monkeypatch, value):
    monkeypatch.setenv("SLURM_JOB_END_TIME", value)
    assert seconds_to_end(asks=False) == float("inf")


def at(match):
    """A time some seconds from now, as PBS prints it."""
    return time.strftime("%a %b %d %H:%M:%S %Y", time.localtime(time.time() + int(match[1])))


PBS = "Job Id: 7.server\n    job_state = R\n    Resource_List.walltime = 02:00:00\n"


@pytest.fixture
def batch_system(monkeypatch, tmp_path):
    """`batch_system(variable, command, output)`: this is a job of a system that answers so."""

    def play(variable, command, output, status=0):
        script = tmp_path / command
        script.write_text(
            f"#!/bin/sh\necho $0 $* >> {tmp_path}/asked\ncat << 'END'\n{output}\nEND\nexit {status}\n"
        )
        script.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        monkeypatch.setenv(variable, "7")

    return play


@pytest.mark.parametrize(
    ("variable", "command", "output", "left", "words"),
    [
        ("PBS_JOBID", "qstat", f"{PBS}    stime = @-3600", 3600, "-f 7"),
        ("PBS_JOBID", "qstat", f"{PBS}    start_time = @-60", 7140, "-f 7"),
        ("PBS_JOBID", "qstat", f"{PBS}    Walltime.Remaining = 3593", 3593, "-f 7"),
        ("PBS_JOBID", "qstat", f"{PBS}    resources_used.walltime = 00:30:05", 5395, "-f 7"),
        ("PBS_JOBID", "qstat", "Job Id: 7.server\n    job_state = R", math.inf, "-f 7"),
        ("LSB_JOBID", "bjobs", "JOBID USER TIME_LEFT\n7 me RUN q a b c Nov 1 10:00 1:29 L", 5340, "-WL 7"),
        ("LSB_JOBID", "bjobs", "JOBID USER TIME_LEFT\n7 me RUN q a b c Nov 1 10:00 1:29 E", math.inf, "-WL 7"),
        ("FLUX_JOB_ID", "flux", "1234", 1234, "job timeleft"),
        ("FLUX_JOB_ID", "flux", "infinity", math.inf, "job timeleft"),
    ],
)  # fmt: skip
def test_the_end_is_asked_for_by_one_rank(
    batch_system, tmp_path, variable, command, output, left, words
):
    batch_system(variable, command, re.sub(r"@(-\d+)", at, output))
    assert seconds_to_end(asks=False) == math.inf
    assert not (tmp_path / "asked").exists()
    assert seconds_to_end(asks=True) == pytest.approx(left, abs=5)
    assert (tmp_path / "asked").read_text() == f"{tmp_path / command} {words}\n"


def test_a_job_of_an_array_of_lsf_asks_for_itself(batch_system, monkeypatch, tmp_path):
    batch_system("LSB_JOBID", "bjobs", "-")
    monkeypatch.setenv("LSB_JOBINDEX", "4")
    assert seconds_to_end(asks=True) == math.inf
    assert (tmp_path / "asked").read_text().endswith("-WL 7[4]\n")


@pytest.mark.parametrize(("output", "status"), [("", 1), ("soon", 0)])
def test_a_batch_system_that_does_not_tell_is_no_limit_and_said_once(
    batch_system, caplog, output, status
):
    batch_system("FLUX_JOB_ID", "flux", output, status)
    assert seconds_to_end(asks=True) == math.inf
    (record,) = caplog.records
    assert record.getMessage().startswith("the end of this job's time is not known, Flux does not")


def test_the_environment_is_taken_before_the_batch_system_is_asked(batch_system, monkeypatch):
    batch_system("FLUX_JOB_ID", "flux", "1234")
    monkeypatch.setenv("ZEROMPI_END_TIME", str(time.time() + 100))
    assert 90 < seconds_to_end(asks=True) <= 100


def test_a_limit_of_zero_overrides_the_batch_system(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 1))
    assert not zerompi.StopRequest(0, margin=10).look()
    assert zerompi.StopRequest(margin=10).look()


@pytest.mark.parametrize("arguments", [{"max_time": -1}, {"margin": float("nan")}])
def test_wrong_times_are_refused(arguments):
    with pytest.raises(ValueError, match=r"expected seconds, 0 or more, got"):
        zerompi.StopRequest(**arguments)


def test_a_loop_of_ones_own_stops_saves_and_ends_with_its_status(run_mpi, tmp_path):
    """Also if a rank computes for seconds after all have been told, and others wait for it."""
    program = f"""
import os, signal, sys, time, torch, zerompi
from mpi4py import MPI
from zerompi import watchdog
watchdog._namespace = lambda: os.getpid()  # as if each were on a node of its own
model = torch.nn.Linear(4, 4)
zero = zerompi.partition(model, optimizer := torch.optim.SGD(model.parameters(), lr=0.1))
with zerompi.StopRequest() as stop:
    pids = MPI.COMM_WORLD.allgather(os.getpid())
    for step in range(1, 1000):
        model(torch.ones(4)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 3 and zero.rank == 1:
            for pid in pids:
                os.kill(pid, signal.SIGTERM)
            time.sleep(8)
        if stop.requested():
            zero.save({str(tmp_path / "saved")!r}, extra={{"step": step}})
            sys.exit(stop.exit_status)
"""
    job = run_mpi(2, ["-c", program], timeout=60)
    assert job.returncode == 75, job.output
    assert "[rank" not in job.output  # no failure is reported
    assert (tmp_path / "saved" / "state.json").is_file()


def test_a_rank_that_leaves_after_the_others_keeps_its_status(run_mpi):
    """As where srun sends SIGTERM to those that still leave when the first one has left with a status."""
    program = """
import atexit, os, signal, sys
atexit.register(lambda: os.kill(os.getpid(), signal.SIGTERM))  # runs last, after MPI_Finalize
import zerompi
with zerompi.StopRequest() as stop:
    os.kill(os.getpid(), signal.SIGUSR1)
    if stop.requested():
        sys.exit(stop.exit_status)
"""
    job = run_mpi(2, ["-c", program], timeout=60)
    assert job.returncode == 75, job.output
