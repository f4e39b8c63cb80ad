"""Hangs are named, and a rank that dies in the middle takes the job down with the last checkpoint whole."""

from __future__ import annotations

import os
import re
import subprocess
import time
from pathlib import Path

import pytest

from zerompi import activity, launch, watchdog
from zerompi.activity import State, Wait, Waiting, hang_report
from zerompi.checkpoint import CheckpointReader
from zerompi.watchdog import Watch

PROGRAM = Path(__file__).with_name("fault_at.py")
WANTED = Waiting("refresh of a", 7, (0, 1, 2, 3))


def state(*waits, phase="forward", stack=("MainThread:", "  train.py:3 in <module>: step()")):
    return State("n1", 42, 5, phase, waits, stack)


# -- what a report says ------------------------------------------------------------------------


def test_a_report_names_who_is_missing_first_and_those_at_one_place_once():
    busy = state(phase="save", stack=("MainThread:", "  train.py:9 in <module>: write()"))
    states = {0: state(WANTED), 1: busy, 2: state(WANTED), 3: "does not answer"}
    assert hang_report(WANTED, 60.4, states, 4) == [
        "waited 60 s in vain: refresh of a",
        "rank 3: missing, and does not answer",
        "rank 1: missing; 5 steps done, save; waiting for no other rank; pid 42 on n1",
        "    MainThread:",
        "      train.py:9 in <module>: write()",
        "ranks 0, 2: waiting for it; 5 steps done, forward",
        "    MainThread:",
        "      train.py:3 in <module>: step()",
    ]


def test_a_report_tells_a_rank_that_is_past_it_from_one_before_it():
    past, before = WANTED._replace(number=8, what="next"), WANTED._replace(number=6, what="last")
    states = {0: state(WANTED), 1: state(past), 2: state(before), 3: state(WANTED)}
    lines = hang_report(WANTED, 60, states, 4)
    assert [line.split(";")[0] for line in lines if line.startswith("rank")] == [
        "rank 2: missing",
        "rank 1: past it",
        "ranks 0, 3: waiting for it",
    ]
    assert "waiting for: last" in lines[1]


def test_a_report_asks_only_the_members_of_the_group():
    wanted = WANTED._replace(members=(0, 2))
    lines = hang_report(wanted, 60, {0: state(wanted), 1: state(), 2: state(wanted), 3: state()}, 4)
    assert "what they send each other does not arrive" in lines[1]
    assert not any(line.startswith("rank 1") for line in lines)


def test_a_wait_stands_in_the_table_while_it_lasts():
    assert activity.longest_wait() is None
    with Wait("something"):
        since, wait = activity.longest_wait()
        assert wait.what == "something"
        assert time.monotonic() - 5 < since <= time.monotonic()
        assert [w.what for w in activity.own_state().waits] == ["something"]
    assert activity.longest_wait() is None


def test_the_own_state_has_the_stack_of_this_test():
    stack = activity.own_state().stack
    assert any("in test_the_own_state_has_the_stack_of_this_test" in line for line in stack)


@pytest.mark.parametrize(("value", "expected"), [("", 1800), ("12.5", 12.5), ("0", float("inf"))])
def test_the_time_a_wait_may_take_is_read_from_the_environment(monkeypatch, value, expected):
    monkeypatch.setenv("ZEROMPI_TIMEOUT", value)
    assert watchdog.seconds_allowed() == expected


@pytest.mark.parametrize("value", ["soon", "-1", "nan"])
def test_a_time_that_is_none_is_refused(monkeypatch, value):
    monkeypatch.setenv("ZEROMPI_TIMEOUT", value)
    with pytest.raises(ValueError, match="ZEROMPI_TIMEOUT: expected seconds"):
        watchdog.seconds_allowed()


# -- jobs --------------------------------------------------------------------------------------


def run_with_fault(run_mpi, phase, kind, directory, **environment):
    job = run_mpi(3, [PROGRAM, phase, kind, directory], timeout=60, env=environment)
    ended = time.time()
    (fault,) = re.findall(r"fault at ([\d.]+)", job.output)
    assert job.returncode != 0
    assert ended - float(fault) < 10, job.output
    with CheckpointReader(directory / "step-2") as saved:  # refuses what is damaged
        assert saved.state["extra"] == {"step": 2}
    assert not (directory / "step-3").exists()
    return job


@pytest.mark.parametrize(
    ("phase", "kind"),
    [
        ("gather", "kill"),
        ("backward", "exit-0"),
        ("save", "segfault"),
        ("save", "exception"),  # all ranks raise it
        ("optimizer", "memory"),
    ],
)
def test_a_rank_that_dies_ends_the_job_and_leaves_the_last_checkpoint(
    run_mpi, tmp_path, phase, kind
):
    job = run_with_fault(run_mpi, phase, kind, tmp_path)
    if kind == "segfault":
        assert "in fault" in job.output  # Python's stack
    elif kind == "exit-0":
        assert job.output.count("left with os._exit(0): ending the job") == 1
    elif kind in ("exception", "memory"):
        assert job.output.count("Traceback (most recent call last)") == 1
        assert "[rank 2 of 3 on" in job.output
    if kind == "memory":
        assert job.output.count("out of memory: a higher stage, more ranks") == 1


def test_a_rank_that_hangs_is_named_with_its_phase_and_stack(run_mpi, tmp_path):
    job = run_with_fault(run_mpi, "gather", "hang", tmp_path, ZEROMPI_TIMEOUT="2")
    assert job.output.count("waited 2 s in vain: all-gather of the parameters of 0") == 1
    assert "rank 2: missing; 2 steps done, forward; waiting for no other rank" in job.output
    assert re.search(r"fault_at.py:\d+ in fault: time.sleep", job.output)
    assert re.search(r"ranks? (0, )?1: waiting for it", job.output)


def test_a_stopped_process_is_named_though_it_does_not_answer(run_mpi, tmp_path):
    job = run_with_fault(run_mpi, "optimizer", "stop", tmp_path, ZEROMPI_TIMEOUT="1")
    assert re.search(r"rank 2: missing, and does not answer: process \d+ is", job.output)


def test_a_neighbour_that_is_gone_ends_the_job(comm, monkeypatch):
    if comm.size == 1:
        pytest.skip("needs a neighbour")
    said = []
    monkeypatch.setattr(launch, "end_job", lambda lines, status: said.append(lines[0]))
    watch = Watch(comm)
    with subprocess.Popen(["true"]) as other:  # in the neighbour's place
        watch.pidfd = os.pidfd_open(other.pid)
    deadline = time.monotonic() + 10
    while not said and time.monotonic() < deadline:
        time.sleep(0.1)
    watch.close()
    assert "has ended in the middle of the job" in said[0]


def until(condition):
    deadline = time.monotonic() + 15
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.1)


def test_after_sigterm_a_rank_of_another_node_that_is_silent_ends_the_job(comm, monkeypatch):
    if comm.size == 1:
        pytest.skip("needs another rank")
    said = []
    monkeypatch.setattr(launch, "end_job", lambda lines, status: said.append(lines[0]))
    monkeypatch.setattr(watchdog, "_namespace", os.getpid)  # each rank on a node of its own
    monkeypatch.setattr(activity.progress, "terminated_at", time.monotonic())
    watch = Watch(comm)
    with Wait("the others"):
        time.sleep(watchdog._STOP_PATIENCE + watchdog._PING_PERIOD + watchdog._PING_TIME + 1)
    assert not said  # all answer
    comm.Barrier()
    if comm.rank == 1:
        watch.read = lambda: None  # gone, as others see it
    if comm.rank == 0:
        with Wait("rank 1"):
            until(lambda: said)
        assert "asked to stop by SIGTERM, and rank 1 does not answer: taken for dead" in said[0]
    comm.Barrier()
    if comm.rank == 1:
        del watch.read
    watch.close()


def test_a_question_that_is_open_when_a_group_ends_ends_nothing(comm, monkeypatch):
    if comm.size == 1:
        pytest.skip("needs another rank")
    said = []
    monkeypatch.setattr(launch, "end_job", lambda lines, status: said.append(lines[0]))
    monkeypatch.setattr(watchdog, "_namespace", os.getpid)  # each rank on a node of its own
    watch = Watch(comm)
    watch.read = lambda: None  # so that nobody answers
    watch.ask_far()
    assert watch._ping is not None
    comm.Barrier()
    watch.close()
    time.sleep(watchdog._PING_TIME + 1)
    assert not said


def test_ranks_that_hear_of_the_end_of_the_job_leave_by_themselves(comm, monkeypatch):
    if comm.size == 1:
        pytest.skip("needs another rank")
    left = []
    monkeypatch.setattr(launch, "leave", left.append)
    watch = Watch(comm)
    if comm.rank == 0:
        watch.say_ending()  # as before MPI_Abort, of which no launcher takes notice here
    else:
        until(lambda: left)
    comm.Barrier()
    watch.close()
    assert set(left) == ({1} if comm.rank else set())


def test_ranks_that_end_one_after_the_other_are_not_taken_for_dead(run_mpi):
    program = (
        "import time, zerompi; from zerompi.collectives import Group\n"
        "group = Group(); time.sleep(2 * group.rank)\n"
        "print('done', flush=True)"
    )
    job = run_mpi(2, ["-c", program], timeout=60)
    assert job.returncode == 0, job.output
    assert job.stdout.count("done") == 2
