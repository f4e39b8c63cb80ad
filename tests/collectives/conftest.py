"""Groups over every layout of nodes that fits the number of ranks."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import pytest
from mpi4py import MPI

import zerompi
from collectives.samples import LAYOUTS
from harness.memory import ON_DEVICE, UNDER_TEST, Memory
from zerompi.collectives import Group


def nodes_of(layout: str) -> list[int] | None:
    """The node of each rank, or None for a layout of any size."""
    layout = layout.removesuffix(" by messages")
    if "," in layout:
        return [int(node) for node in layout.split(",")]
    if "+" in layout:
        sizes = layout.replace("|", "+").split("+")
        return [node for node, n in enumerate(sizes) for _ in range(int(n))]
    return None


def groups_of(layout: str) -> list[int] | None:
    """The group of each node, or None for one group."""
    if "|" not in layout:
        return None
    return [number for number, part in enumerate(layout.split("|")) for _ in part.split("+")]


def fits(layout: str) -> bool:
    """Whether the layout has as many ranks as the world."""
    nodes = nodes_of(layout)
    return nodes is None or len(nodes) == MPI.COMM_WORLD.size


@pytest.fixture(params=[layout for layout in LAYOUTS if fits(layout)])
def group(
    request: pytest.FixtureRequest, comm: MPI.Intracomm, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Group]:
    """A group with each layout of nodes that fits, its algorithm, and memory shared or not."""
    nodes = nodes_of(request.param) or [0] * comm.size
    algorithm = "flat" if request.param.startswith("flat") else "hierarchical"
    if request.param.endswith("by messages"):
        monkeypatch.setenv("ZEROMPI_SHARED_MEMORY", "0")
    made = Group(
        comm, zerompi.Topology.from_nodes(nodes, groups_of(request.param)), algorithm=algorithm
    )
    yield made
    made.close()


@pytest.fixture
def flat(comm: MPI.Intracomm) -> Iterator[Group]:
    """A flat group."""
    made = Group(comm, algorithm="flat")
    yield made
    made.close()


@pytest.fixture
def memory() -> Memory:
    """Where tests put what they communicate."""
    return UNDER_TEST


@pytest.fixture
def xp() -> ModuleType:
    """NumPy, or CuPy where the memory is a device's."""
    if not ON_DEVICE:
        import numpy

        return numpy
    import cupy
    import cupy.testing

    return cupy
