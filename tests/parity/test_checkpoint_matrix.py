"""Saved at any number of ranks and any stage, loaded at any other: the run goes on as if uninterrupted.

With ZEROMPI_ALL_CASES=1 all pairs are tried, on four ranks 256 of them; else a few.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path

import pytest
import torch
from mpi4py import MPI

import zerompi
from harness.cover import ALL_CASES, all_cases
from models import CASES, build, own_slice

CASE = CASES["gpt"]
STAGES = (0, 1, 2, 3)
BEFORE, AFTER = range(3), range(3, 13 if all_cases() else 6)


@pytest.fixture
def shared(comm, tmp_path) -> Path:
    """Rank 0's temporary directory, on all ranks."""
    return comm.bcast(tmp_path)


@contextmanager
def first_ranks(comm: MPI.Intracomm, count: int) -> Iterator[MPI.Intracomm | None]:
    """A communicator of the first `count` ranks; None on the others."""
    sub = comm.Split(0 if comm.rank < count else MPI.UNDEFINED, comm.rank)
    try:
        yield None if sub == MPI.COMM_NULL else sub
    finally:
        if sub != MPI.COMM_NULL:
            sub.Free()


def train(comm, model, optimizer, numbers) -> list[float]:
    """The mean losses over all ranks."""
    losses = []
    for step in numbers:
        x, y = own_slice(CASE.batch(step), comm.rank, comm.size)
        loss = CASE.loss(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(comm.allreduce(loss.item()) / comm.size)
    return losses


def save_and_go_on(comm, path: Path, stage: int):
    """Train, save, train on: losses and weights of the uninterrupted run."""
    model, optimizer = build(CASE)
    with zerompi.partition(model, optimizer, stage=stage, comm=comm) as zero:
        train(comm, model, optimizer, BEFORE)
        zero.save(path, blocking=False)
        return train(comm, model, optimizer, AFTER), zero.full_state_dict()


def load_and_go_on(comm, path: Path, stage: int):
    model, optimizer = build(CASE, seed=99)
    with zerompi.partition(model, optimizer, stage=stage, comm=comm) as zero:
        zero.load(path)
        return train(comm, model, optimizer, AFTER), zero.full_state_dict()


def check(comm, path: Path, written: tuple[int, int], others: Sequence[tuple[int, int]]) -> None:
    """Save as `written`, (ranks, stage), says, and load at each of `others`."""
    expected = None
    with first_ranks(comm, written[0]) as sub:
        if sub is not None:
            expected = save_and_go_on(sub, path, written[1])
    losses, weights = comm.bcast(expected)
    for ranks, stage in others:
        with first_ranks(comm, ranks) as sub:
            if sub is None:
                continue
            found_losses, found = load_and_go_on(sub, path, stage)
            if (ranks, stage) == written:
                assert found_losses == losses
                assert all(torch.equal(found[name], weights[name]) for name in weights)
                continue
            torch.testing.assert_close(found_losses, losses, rtol=1e-6, atol=0)
            for name, weight in weights.items():
                distance = torch.linalg.vector_norm(found[name] - weight)
                assert distance <= 1e-6 * torch.linalg.vector_norm(weight), (ranks, stage, name)


@pytest.mark.mpi(min_size=4)  # of which 1, 2 and 3 save and load, too
@pytest.mark.parametrize("stage", STAGES)
def test_a_few_of_all_pairs_continue_as_if_uninterrupted(comm, shared, stage):
    for ranks in range(1, comm.size + 1):
        other = ranks % comm.size + 1, (stage + ranks) % 4
        check(comm, shared / f"{ranks}", (ranks, stage), [(ranks, stage), other])


@pytest.mark.slow
@pytest.mark.skipif(not all_cases(), reason=f"takes a minute: set {ALL_CASES}=1")
def test_all_pairs_continue_as_if_uninterrupted(comm, shared):
    everything = list(product(range(1, comm.size + 1), STAGES))
    for number, written in enumerate(everything):
        check(comm, shared / f"{number}", written, everything)
