"""An exception inside `join` ends the job, also where other ranks go along with those that still have batches."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("join_fails.py")


@pytest.mark.parametrize(
    ("phase", "rank", "stage"),
    [
        ("forward", 1, 3),  # the others listen
        ("backward", 0, 3),  # rank 2 listens, the others work
        ("optimizer", 2, 0),  # the others work
        ("end", 3, 3),
    ],
)
def test_an_exception_of_one_rank_inside_join_ends_the_job_with_its_traceback(
    run_mpi, phase, rank, stage
):
    job = run_mpi(4, [PROGRAM, phase, str(rank), str(stage)], timeout=60)
    ended = time.time()
    (fault,) = re.findall(r"fault at ([\d.]+)", job.output)
    assert ended - float(fault) < 10, job.output
    assert job.returncode != 0
    assert "is through" not in job.output
    assert job.output.count("Traceback (most recent call last)") == 1
    (line,) = [line for line in job.output.splitlines() if "ValueError:" in line]
    assert re.fullmatch(rf"\[rank {rank} of 4 on \S+\] ValueError: broken on purpose", line)
