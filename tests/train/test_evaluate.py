from __future__ import annotations

from math import log

import pytest
import torch
import torch.nn.functional as F
from mpi4py import MPI

import zerompi
from zerompi.train.data import ByteCodec, load_corpus, windows
from zerompi.train.evaluate import evaluate
from zerompi.train.model import GPT, GPTConfig
from zerompi.train.sample import sample_continuation

CONTEXT = 16


def _model() -> GPT:
    torch.manual_seed(1)
    return GPT(GPTConfig(layers=2, width=32, heads=2))


@pytest.mark.parametrize(("num_windows", "rows"), [(7, 2), (1, 3), (12, 1), (10**6, 64)])
def test_evaluation_is_the_mean_over_all_windows_at_any_rank_count(
    comm: MPI.Intracomm, num_windows: int, rows: int
) -> None:
    model, corpus = _model(), load_corpus(None, ByteCodec(), CONTEXT)
    count = min(num_windows, (len(corpus.held_out) - 1) // CONTEXT)
    available = (len(corpus.held_out) - 1) // CONTEXT
    starts = [index * available // count * CONTEXT for index in range(count)]
    with torch.no_grad():
        inputs, targets = windows(corpus.held_out, starts, CONTEXT)
        expected = F.cross_entropy(model(inputs).double().flatten(0, 1), targets.flatten()).item()

    zero = zerompi.partition(model, comm=comm, stage=3)
    got = evaluate(model, corpus, comm, context=CONTEXT, num_windows=num_windows, rows=rows)
    zero.close()
    assert got.num_windows == count
    assert got.loss == pytest.approx(expected, rel=1e-6)
    assert got.bits_per_byte == pytest.approx(expected / log(2), rel=1e-6)
    assert comm.allgather(got) == [got] * comm.size
    assert model.training


def test_all_ranks_sample_the_same_text_and_again_the_same(comm: MPI.Intracomm) -> None:
    model = _model()
    torch.manual_seed(comm.rank)
    with zerompi.partition(model, comm=comm, stage=3):
        first, second = (
            sample_continuation(model, [65] * 20, 12, comm, context=CONTEXT, seed=5)
            for _ in range(2)
        )
    assert first == second
    assert len(first) == 12
    assert comm.allgather(first) == [first] * comm.size
