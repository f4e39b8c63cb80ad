"""A killed rank loses nothing that was saved; crash.py does it as often as one likes."""

from __future__ import annotations

import pytest

from checkpoint.crash import crash


@pytest.mark.slow
def test_the_latest_checkpoint_survives_kills_at_random_moments(run_mpi) -> None:
    assert run_mpi is not None  # one rank only
    rounds = crash(count=4, ranks=2, width=128, seed=0)
    assert max(killed.seconds for killed in rounds) < 10
