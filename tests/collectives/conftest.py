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
from zerompi.traffic import Traffic


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


class Groups:
    """Groups that tests have one after the other: to make one takes longer than most tests.

    After a test that has failed none is used again, since a message may be left in it; it is there until
    the end, so that the watchdogs of other ranks get their answers.
    """

    def __init__(self, comm: MPI.Intracomm) -> None:
        self._comm = comm
        self._made: dict[str, Group] = {}
        self._abandoned: list[Group] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """All ranks have the same outcome."""
        if report.failed:
            self._abandoned += self._made.values()
            self._made.clear()

    def get(self, layout: str) -> Group:
        """A group that has counted nothing yet. Collective."""
        if layout not in self._made:
            self._made[layout] = self._make(layout)
        group = self._made[layout]
        vars(group.traffic).update(vars(Traffic()))
        return group

    def _make(self, layout: str) -> Group:
        algorithm = "flat" if layout.startswith("flat") else "hierarchical"
        if layout == "flat anywhere":
            return Group(self._comm, algorithm="flat")
        nodes = nodes_of(layout) or [0] * self._comm.size
        topology = zerompi.Topology.from_nodes(nodes, groups_of(layout))
        with pytest.MonkeyPatch.context() as patch:
            if layout.endswith("by messages"):
                patch.setenv("ZEROMPI_SHARED_MEMORY", "0")
            return Group(self._comm, topology, algorithm=algorithm)

    def close(self) -> None:
        """Close all. Collective."""
        for group in self._made.values():
            group.close()


@pytest.fixture(scope="session")
def groups(request: pytest.FixtureRequest) -> Iterator[Groups]:
    """What the tests of this run share."""
    made = Groups(MPI.COMM_WORLD)
    request.config.pluginmanager.register(made)
    yield made
    request.config.pluginmanager.unregister(made)
    made.close()


@pytest.fixture(params=[layout for layout in LAYOUTS if fits(layout)])
def group(request: pytest.FixtureRequest, groups: Groups) -> Group:
    """A group with each layout of nodes that fits, its algorithm, and memory shared or not."""
    return groups.get(request.param)


@pytest.fixture
def flat(groups: Groups) -> Group:
    """A flat group, of the nodes that there are."""
    return groups.get("flat anywhere")


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
