"""What the tests of refreshes that go on beside the next forward have in common."""

from __future__ import annotations

import random
import time

import pytest
import torch
from mpi4py import MPI

import zerompi
from models import CASES, build, step
from zerompi.unit import Unit

# Layouts in which parameters are sent to other ranks.
TOPOLOGIES = ["two nodes", "one node, messages"][: MPI.COMM_WORLD.size]


def topology_of(name, comm, monkeypatch):
    """One of `TOPOLOGIES`."""
    if name == "one node, messages":
        monkeypatch.setenv("ZEROMPI_SHARED_MEMORY", "0")
        return zerompi.Topology(comm, ranks_per_node=comm.size)
    sizes = [comm.size - comm.size // 2, comm.size // 2]
    return zerompi.Topology(comm, [size for size in sizes if size])


def partitioned(comm, name, **options):
    model, optimizer = build(CASES[name])
    return model, optimizer, zerompi.partition(model, optimizer, comm=comm, **options)


def skip_if_eager(zero):
    """Without a communication thread parameters return before the step does, whatever is asked for."""
    if not zero._parts.hooks.refreshes.are_ahead:
        zero.close()
        pytest.skip("needs a communication thread")


def make_slow(monkeypatch, longest=0.01):
    """Whoever does not wait for a refresh reads what was there before."""
    refresh, source = Unit.refresh, random.Random(0)

    def late(unit, **options):
        time.sleep(longest * source.random())
        refresh(unit, **options)

    monkeypatch.setattr(Unit, "refresh", late)


def trained(comm, name, stage, topology, *, steps=5, **options):
    """Losses of this rank, and the weights afterwards."""
    case = CASES[name]
    model, optimizer, zero = partitioned(comm, name, stage=stage, topology=topology, **options)
    with zero:
        losses = [step(comm, case, model, optimizer, number) for number in range(steps)]
        return losses, zero.full_state_dict()


def assert_same_bits(ours, theirs):
    assert ours[0] == theirs[0]
    for key, value in theirs[1].items():
        assert torch.equal(ours[1][key], value), key


def values_of(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
