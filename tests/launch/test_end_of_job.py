"""A rank that ends early takes the job down within seconds, and says why."""

from __future__ import annotations

import errno
import re
import time
from pathlib import Path

import pytest

from zerompi.launch import is_out_of_memory

PROGRAM = Path(__file__).with_name("rank_fails.py")
MARK = r"\[rank 2 of 3 on \S+\] "


def seconds_after(job):
    """Seconds from the time at which the ranks were ready to fail."""
    ready = max(float(stamp) for stamp in re.findall(r"left at ([\d.]+)", job.output))
    return time.time() - ready


@pytest.mark.parametrize("way", ["exception", "thread"])
def test_exception_on_one_rank_ends_all_with_its_traceback(run_mpi, way):
    job = run_mpi(3, [PROGRAM, way], timeout=60)
    assert seconds_after(job) < 5
    assert job.returncode != 0
    assert re.search(MARK + "Traceback", job.output)
    assert re.search(MARK + ".*in fail", job.output)
    assert re.search(MARK + "ValueError: broken on purpose", job.output)


def test_interrupt_of_one_rank_ends_all(run_mpi):
    job = run_mpi(3, [PROGRAM, "interrupt"], timeout=60)
    assert seconds_after(job) < 5
    assert re.search(MARK + "KeyboardInterrupt", job.output)


@pytest.mark.parametrize(
    ("way", "status", "code"), [("exit", 3, "3"), ("exit-message", 1, "'no such file'")]
)
def test_failed_exit_of_one_rank_ends_all_with_its_status(run_mpi, way, status, code):
    job = run_mpi(3, [PROGRAM, way], timeout=60)
    assert seconds_after(job) < 5
    assert job.returncode == status
    assert re.search(MARK + re.escape(f"left with sys.exit({code})"), job.output)


def test_killed_rank_ends_all(run_mpi):
    job = run_mpi(3, [PROGRAM, "killed"], timeout=60)
    assert seconds_after(job) < 5
    assert job.returncode != 0


def test_exception_before_any_communication_ends_all(run_mpi):
    job = run_mpi(3, [PROGRAM, "first-line"], timeout=60)
    assert re.search(MARK + "ValueError: broken on purpose", job.output)
    assert job.returncode != 0


@pytest.mark.parametrize("way", ["training-exception", "training-exit"])
def test_rank_that_fails_in_training_ends_all(run_mpi, way):
    job = run_mpi(3, [PROGRAM, way], timeout=60)
    assert job.returncode != 0
    assert re.search(MARK, job.output)


def test_a_traceback_is_seen_behind_the_hook_of_torch_distributed(run_mpi, tmp_path):
    """That hook collects in a buffer what the hooks before it write, to pass it on afterwards."""
    program = (
        "import sys, zerompi, torch.distributed as dist; from mpi4py import MPI\n"
        "comm = MPI.COMM_WORLD\n"
        f"store = dist.FileStore({str(tmp_path / 'store')!r}, comm.size)\n"
        "dist.init_process_group('gloo', store=store, rank=comm.rank, world_size=comm.size)\n"
        "raise ValueError('a bug')"
    )
    job = run_mpi(3, ["-c", program], timeout=60)
    assert job.returncode != 0
    assert re.search(MARK + "ValueError: a bug", job.output)


def test_rank_that_leaves_the_training_early_is_named(run_mpi):
    job = run_mpi(3, [PROGRAM, "training-end"], timeout=60)
    assert job.returncode != 0
    assert "MismatchError" in job.output
    assert re.search(r"rank 2: end of the program", job.output)


def test_exit_that_is_caught_ends_nothing(run_mpi):
    job = run_mpi(3, [PROGRAM, "caught"], timeout=60)
    assert job.returncode == 0, job.output
    assert job.output.count("went on") == 3


def test_exit_of_all_ranks_keeps_what_they_said(run_mpi):
    program = "import zerompi, sys; print('said before', flush=True); sys.exit(4)"
    job = run_mpi(3, ["-c", program], timeout=60)
    assert job.returncode == 4
    assert job.output.count("said before") == 3


@pytest.mark.parametrize(
    ("program", "status"), [("1 / 0", 1), ("sys.exit(3)", 3), ("sys.exit()", 0)]
)
def test_job_of_one_rank_ends_as_without_zerompi(run_mpi, program, status):
    job = run_mpi(1, ["-c", f"import sys, zerompi; {program}"], timeout=60)
    assert job.returncode == status
    assert "[rank" not in job.output
    assert ("Traceback" in job.output) == (status == 1)


def test_child_made_by_fork_is_no_rank(run_mpi):
    program = (
        "import os, threading, zerompi; from mpi4py import MPI\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    thread = threading.Thread(target=lambda: 1 / 0); thread.start(); thread.join()\n"
        "    os._exit(3)\n"
        "assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 3\n"
        "MPI.COMM_WORLD.Barrier(); print('alive', flush=True)"
    )
    job = run_mpi(2, ["-c", program], timeout=60)
    assert job.returncode == 0, job.output
    assert job.output.count("alive") == 2


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), True),
        (OSError(errno.ENOENT, "out of memory.txt"), False),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 1 bytes"), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 1"), True),
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("can't start new thread"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("expected less than what is out of memory"), False),
    ],
)
def test_lack_of_memory_is_known_by_class_number_or_text(error, expected):
    assert is_out_of_memory(error) is expected
