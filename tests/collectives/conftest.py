"""Groups over every layout of nodes that fits the number of ranks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from collectives.samples import LAYOUTS
from mpi4py import MPI

import zerompi
from zerompi.collectives import Group


def make_group(comm: MPI.Intracomm, layout: str) -> Group:
    """The group of `comm` with a layout of `samples.LAYOUTS`; skips the test if it does not fit."""
    if layout == "flat":
        return Group(comm, algorithm="flat")
    if layout == "one node":
        return Group(comm, zerompi.Topology(comm, comm.size), algorithm="hierarchical")
    if "," in layout:
        nodes = [int(node) for node in layout.split(",")]
        topology = zerompi.Topology.from_nodes(nodes)
    else:
        sizes = [int(n) for n in layout.split("+")]
        if sum(sizes) != comm.size:
            pytest.skip(f"{layout} needs {sum(sizes)} ranks")
        topology = zerompi.Topology(comm, sizes)
    if topology.size != comm.size:
        pytest.skip(f"{layout} needs {topology.size} ranks")
    return Group(comm, topology, algorithm="hierarchical")


@pytest.fixture(params=LAYOUTS)
def group(request: pytest.FixtureRequest, comm: MPI.Intracomm) -> Iterator[Group]:
    """A group with each layout of nodes and its algorithm."""
    made = make_group(comm, request.param)
    yield made
    made.close()


@pytest.fixture
def flat(comm: MPI.Intracomm) -> Iterator[Group]:
    """A flat group."""
    made = Group(comm, algorithm="flat")
    yield made
    made.close()
