"""The table of stages, and the memory that follows from it."""

from __future__ import annotations

import pytest

from zerompi.placement import STAGES, Placement
from zerompi.report import ElementBytes, zero_formula

PSI, N = 7_500_000_000, 64  # figure 1 of arXiv:1910.02054


def test_each_stage_shards_one_thing_more():
    sharded = [[p is Placement.SHARD for p in STAGES[stage]] for stage in range(4)]
    assert sharded == [
        [False, False, False],
        [False, False, True],
        [False, True, True],
        [True, True, True],
    ]
    assert sorted(STAGES) == [0, 1, 2, 3]


@pytest.mark.parametrize(("stage", "gigabytes"), [(0, 120.0), (1, 31.4), (2, 16.6), (3, 1.9)])
def test_memory_is_that_of_the_zero_paper(stage, gigabytes):
    per_element = ElementBytes(parameter=2, gradient=2, optimizer_state=12)
    total = sum(zero_formula(PSI, N, STAGES[stage], per_element).values())
    assert total / 1e9 == pytest.approx(gigabytes, abs=0.05)
