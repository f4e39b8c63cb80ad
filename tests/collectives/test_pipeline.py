"""In which order the chunks of a collective go on."""

from __future__ import annotations

import pytest

from zerompi.collectives.pipeline import overlapped


def chunk(number, exchanges, log):
    for exchange in range(exchanges):
        log.append(f"start {number}.{exchange}")
        yield
        log.append(f"finish {number}.{exchange}")


@pytest.mark.parametrize("exchanges", [0, 1, 2, 3])
@pytest.mark.parametrize("chunks", [0, 1, 2, 5])
def test_messages_of_a_chunk_start_before_those_of_the_last_are_waited_for(chunks, exchanges):
    log: list[str] = []
    overlapped(chunk(number, exchanges, log) for number in range(chunks))
    assert len(log) == 2 * chunks * exchanges
    for number in range(1, chunks):
        for exchange in range(exchanges):
            behind = f"finish {number - 1}.{exchange}"
            assert log.index(f"start {number}.{exchange}") < log.index(behind)
    for exchange in range(exchanges):
        # All ranks start and finish the exchanges of one kind in the order of the chunks.
        for what in ("start", "finish"):
            places = [log.index(f"{what} {number}.{exchange}") for number in range(chunks)]
            assert places == sorted(places)
