"""Ranks that are late now and then change no bit: what one reads, another has finished writing."""

from __future__ import annotations

import random
import time
from functools import cache

import pytest
import torch
from mpi4py import MPI

import zerompi
from harness.memory import ON_DEVICE
from models import CASES, build, own_slice

STEPS = 4 if ON_DEVICE else 12

pytestmark = pytest.mark.skipif(
    MPI.COMM_WORLD.size < 4 and not ON_DEVICE, reason="takes long, and 4 ranks show it best"
)


def weights_after(comm, stage, topology, longest, refresh="eager"):
    """The weights after training in which random ranks sleep in random modules and hooks."""
    case = CASES["gpt"]
    model, optimizer = build(case)
    source = random.Random(comm.rank)

    def pause(*_):
        if longest and source.random() < 0.1:
            time.sleep(longest * source.random())

    for module in model.modules():
        module.register_forward_hook(pause)
        module.register_full_backward_hook(pause)
    options = {"stage": stage, "comm": comm, "topology": topology, "refresh": refresh}
    with zerompi.partition(model, optimizer, **options) as zero:
        for step in range(STEPS):
            x, y = own_slice(case.batch(step), comm.rank, comm.size)
            case.loss(model(x), y).backward()
            pause()
            optimizer.step()
            optimizer.zero_grad()
        return zero.full_state_dict()


def undisturbed(stage, ranks_per_node):
    """The weights where nobody sleeps; those of all stages with shards, which are the same ones."""
    return _undisturbed(min(stage, 1), ranks_per_node)


@cache
def _undisturbed(stage, ranks_per_node):
    comm = MPI.COMM_WORLD
    return weights_after(comm, stage, zerompi.Topology(comm, ranks_per_node), 0.0)


@pytest.mark.parametrize("ranks_per_node", [4, 2] if MPI.COMM_WORLD.size > 2 else [4])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_late_ranks_change_no_bit(comm, stage, ranks_per_node):
    state = weights_after(comm, stage, zerompi.Topology(comm, ranks_per_node), 0.003)
    for name, value in undisturbed(stage, ranks_per_node).items():
        assert torch.equal(state[name], value), name


@pytest.mark.parametrize("memory", ["shared", "messages"])
@pytest.mark.parametrize("stage", [1, 2])
def test_late_ranks_change_no_bit_where_parameters_return_later(comm, stage, memory, monkeypatch):
    monkeypatch.setenv("ZEROMPI_SHARED_MEMORY", "1" if memory == "shared" else "0")
    ranks_per_node = 2 if comm.size == 4 else 1
    topology = zerompi.Topology(comm, ranks_per_node)
    state = weights_after(comm, stage, topology, 0.003, "ahead")
    for name, value in undisturbed(stage, ranks_per_node).items():
        assert torch.equal(state[name], value), name
