"""Ranks that do not do the same end the job with one report, which tells what each was about to do."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("disagree.py")
_MARK = r"\[rank (\d) of \d on [^\]]+\] "


def report_of(job, teller):
    """The lines of the one report, without the mark of the rank that has written it."""
    assert job.returncode != 0
    lines = [line for line in job.output.splitlines() if re.match(_MARK, line)]
    assert {re.match(_MARK, line)[1] for line in lines} == {str(teller)}, job.output
    return [re.sub(_MARK, "", line, count=1) for line in lines]


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_in_different_collectives_are_named_with_their_places(run_mpi, ranks):
    job = run_mpi(ranks, [PROGRAM, "order"], timeout=60)
    first, second, *places = report_of(job, 0)
    assert first == "MismatchError: ranks disagree on what comes next:"
    assert second == (
        "rank 0: reduction of the gradients of (root)"
        if ranks == 2
        else "ranks 0, 1, 2: reduction of the gradients of (root)"
    )
    at = places.index(f"rank {ranks - 1}: full_state_dict(rank0_only=False)")
    assert re.fullmatch(r"    .*disagree.py:\d+ in differ: step\(\)", places[at - 2])
    assert re.fullmatch(r"    .*disagree.py:\d+ in step: .*\.backward\(\)", places[at - 1])
    assert re.fullmatch(r"    .*disagree.py:\d+ in differ: zero.full_state_dict\(\)", places[-1])
    assert job.output.count("MismatchError") == 1
    assert "Traceback" not in job.output


def test_different_shapes_are_named(run_mpi):
    job = run_mpi(3, [PROGRAM, "shape"], timeout=60)
    _, *lines = report_of(job, 0)
    assert [line for line in lines if not line.startswith("    ")] == [
        "ranks 0, 1: all_gather (torch.float32, 4 elements)",
        "rank 2: all_gather (torch.float32, 5 elements)",
    ]


@pytest.mark.parametrize(
    ("way", "teller", "last"),
    [
        ("refusal", 2, r"ValueError: recv: expected 12 elements \(4 of each of 3 ranks\), got 3"),
        ("model", 0, r"MismatchError: ranks disagree on what to partition: .*\(9, 8\).*"),
        ("argument", 0, "ValueError: stage: expected 0, 1, 2 or 3, got 7"),
        ("settings", 0, "MismatchError: .* rank 0 has lr 0.1 .* rank 2 has lr 1.1.*"),
        ("nonfinite", 0, "zerompi.errors.NonFiniteError: the gradient.*"),
    ],
)
def test_an_error_that_all_ranks_raise_is_reported_once(run_mpi, way, teller, last):
    job = run_mpi(3, [PROGRAM, way], timeout=60)
    lines = report_of(job, teller)
    assert lines.count("Traceback (most recent call last):") == 1
    assert re.fullmatch(rf"(zerompi\.errors\.)?{last}", lines[-1])


def test_the_exception_that_has_led_to_a_disagreement_is_reported_with_it(run_mpi):
    job = run_mpi(3, [PROGRAM, "cause"], timeout=60)
    lines = report_of(job, 2)
    assert "OSError: no such batch" in lines
    assert any("raise OSError" in line for line in lines)
    assert "rank 2: close of the partition, after OSError: no such batch" in lines


def test_another_rank_reports_what_the_first_has_caught(run_mpi):
    job = run_mpi(4, [PROGRAM, "caught"], timeout=60)
    assert job.seconds < 30
    assert report_of(job, 1)[0] == "MismatchError: ranks disagree on what comes next:"
