"""The programs in docs/examples do what the pages say."""

from __future__ import annotations

import json
import re

import pytest

from harness.mpirun import ROOT

EXAMPLES = ROOT / "docs" / "examples"


def test_first_run_learns_and_saves(run_mpi, tmp_path):
    job = run_mpi(4, [EXAMPLES / "first_run.py"], cwd=tmp_path)
    assert job.returncode == 0, job.output
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", job.stdout)]
    assert len(losses) == 4
    assert losses[-1] < 0.5 * losses[0]
    assert (tmp_path / "first-run" / "step-100" / "model.safetensors").is_file()


@pytest.mark.parametrize("ranks", [3, 4])
def test_traffic_by_stage_equals_the_theory(run_mpi, ranks):
    job = run_mpi(ranks, [EXAMPLES / "traffic_by_stage.py"])
    assert job.returncode == 0, job.output
    assert job.stdout.splitlines() == [
        f"{ranks} nodes",
        "stage 0: 2.000 = all_reduce 2.000",
        "stage 1: 2.000 = reduce_scatter 1.000 + refresh 1.000",
        "stage 2: 2.000 = reduce_scatter 1.000 + refresh 1.000",
        "stage 3: 3.000 = reduce_scatter 1.000 + all_gather 2.000",
        "1 node",
        "stage 0: 2.000 = all_reduce 2.000",
        "stage 1: 1.000 = reduce_scatter 1.000",
        "stage 2: 1.000 = reduce_scatter 1.000",
        "stage 3: 1.000 = reduce_scatter 1.000",
    ]


def test_hierarchy_halves_the_bytes_between_nodes(run_mpi):
    job = run_mpi(4, [EXAMPLES / "hierarchy.py"])
    assert job.returncode == 0, job.output
    assert job.stdout.splitlines() == [
        "flat: 8000 bytes between nodes, 4000 inside",
        "hierarchical: 4000 bytes between nodes, 8000 inside",
    ]


def test_model_too_large_for_one_rank_dies_at_stage_0(run_mpi):
    job = run_mpi(4, [EXAMPLES / "too_large_for_one.py", "--stage", "0"])
    assert job.returncode != 0
    assert re.search("can't allocate memory|out of memory", job.output)
    assert "trained within the limit" not in job.stdout


def test_model_too_large_for_one_rank_trains_at_stage_3(run_mpi):
    job = run_mpi(4, [EXAMPLES / "too_large_for_one.py", "--stage", "3"])
    assert job.returncode == 0, job.output
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", job.stdout)]
    assert len(losses) == 5
    assert losses[-1] < losses[0]
    assert "trained within the limit" in job.stdout


@pytest.mark.slow
def test_memory_by_category_is_that_of_the_formula(run_mpi):
    job = run_mpi(4, [EXAMPLES / "memory_by_category.py"], timeout=200)
    assert job.returncode == 0, job.output
    results = [json.loads(line) for line in job.stdout.splitlines()]
    assert [result["stage"] for result in results] == [0, 1, 2, 3]
    for result in results:
        total = 0.0
        for category in ("parameters", "gradients", "optimizer_states"):
            formula = result[f"{category} by formula"]
            assert result[category] == pytest.approx(formula, rel=0.05), (result, category)
            total += formula
        assert result["process"] == pytest.approx(total, rel=0.05), result
