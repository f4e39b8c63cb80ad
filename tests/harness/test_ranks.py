"""What conftest.py and harness/ranks.py promise: a run on several ranks behaves as one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest


def test_failure_on_one_rank_fails_the_test_and_is_shown_by_rank_0(run_suite):
    job = run_suite(
        """
        def test_one_fails():
            print("said before")
            assert not LAST, "broken on purpose"
        def test_next_one_runs(comm):
            assert comm.allreduce(1) == WORLD.size
        """
    )
    assert job.returncode == 1
    assert job.output.count("1 failed, 1 passed") == 1
    assert "=== rank 1 of 2" in job.output
    assert "broken on purpose" in job.output
    assert "said before" in job.output


@pytest.mark.parametrize(
    ("before", "after"), [("if LAST: 1 / 0", "pass"), ("pass", "if LAST: 1 / 0")]
)
def test_setup_or_teardown_that_fails_on_one_rank_fails_on_all(run_suite, before, after):
    job = run_suite(
        f"""
        @pytest.fixture
        def thing():
            {before}
            yield
            {after}
        def test_with_thing(thing):
            WORLD.Barrier()
        """
    )
    assert job.returncode == 1
    assert "1 error" in job.output
    assert "ZeroDivisionError" in job.output


def test_skip_on_some_ranks_is_a_failure(run_suite):
    job = run_suite(
        """
        @pytest.fixture
        def only_some():
            if LAST:
                pytest.skip("not here")
        def test_some(only_some):
            WORLD.Barrier()
        def test_none():
            pytest.skip("nowhere")
        """
    )
    assert job.returncode == 1
    assert "1 skipped, 1 error" in job.output
    assert "the outcome differs between ranks" in job.output


def test_rank_that_hangs_ends_the_job_with_all_stacks(run_suite):
    job = run_suite(
        """
        def test_earlier():
            assert not LAST, "earlier failure"
        def test_hangs():
            if LAST:
                raise ValueError("left early")
            WORLD.Barrier()
        """,
        timeout=8,
    )
    assert job.returncode != 0
    assert "earlier failure" in job.output
    assert "ValueError: left early" in job.output
    assert "test_hangs ran longer than 8 s" in job.output
    assert "WORLD.Barrier()" in job.output


@pytest.mark.parametrize("way", ["pytest.exit('enough')", "raise KeyboardInterrupt"])
def test_session_that_ends_on_one_rank_ends_the_job(run_suite, way):
    job = run_suite(
        f"""
        def test_ends():
            if LAST:
                {way}
            WORLD.Barrier()
        """,
        timeout=60,
    )
    assert job.returncode != 0
    assert "[rank 1 of 2" in job.output
    assert job.seconds < 60


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("if LAST: 1 / 0", "ZeroDivisionError"),
        ("if LAST:\n    def test_more(): pass", "ranks collected different tests"),
    ],
)
def test_ranks_that_collect_different_tests_run_none(run_suite, source, message):
    job = run_suite("def test_one(): WORLD.Barrier()\n" + source)
    assert job.returncode == 2
    assert message in job.output
    assert "passed" not in job.output


def test_console_script_works_as_the_module(run_suite):
    script = Path(sys.executable).with_name("pytest")
    job = run_suite("def test_one(comm): comm.Barrier()", program=(script,))
    assert job.returncode == 0, job.output
    assert job.output.count("1 passed") == 1


def test_one_process_without_mpiexec_works(run_suite):
    job = run_suite("def test_one(comm): assert comm.size == 1", ranks=1)
    assert job.returncode == 0, job.output
