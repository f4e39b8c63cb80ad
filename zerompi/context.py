"""What all units of one partition share."""

from __future__ import annotations

from dataclasses import dataclass, field

from zerompi.attendance import Attendance
from zerompi.collectives.group import Group
from zerompi.collectives.shared import Window
from zerompi.comm_thread import CommThread
from zerompi.placement import Stage
from zerompi.precision import MixedPrecision, NonFinite
from zerompi.quantize import Quantize
from zerompi.regions import Region, Settling, Slot
from zerompi.report import MemoryLedger, PhaseTimes


@dataclass
class Context:
    """What all units of one partition share.

    `world` is every rank of the partition. The ranks of `shard_group` hold one copy of the sharded
    state together; `replica_group` joins the ranks that hold the same shard (None: there is one
    copy). The ranks of `node_group` keep what was gathered together, until the parameters change
    (None: nobody keeps it). `is_single_node` tells whether every shard group is on one node.
    `quantize` says which messages are quantized (None: none).

    Attributes:
        windows: shared memory of the partition, to be freed with it.
        regions: where buckets lie.
        slots: where gathered parameters lie, for each depth at which units enclose each other.
        ahead: what was gathered before anybody needed it, or has stayed until somebody needs it again.
        spared_nbytes: of gathers in this step that were not needed, since the parameters had stayed.
        is_shared: whether the full parameters, while they are there, are there once for a node.
        nonfinite: what a step does whose gradient is not finite.
        refreshes_ahead: whether a unit waits for its refresh where it is used, not where it is stepped.
        reshards_last: whether what a forward uses last is freed before its backward, and gathered again.
        attendance: which ranks take part, inside `join`.
    """

    stage: Stage
    world: Group
    shard_group: Group
    replica_group: Group | None
    node_group: Group | None
    is_single_node: bool
    precision: MixedPrecision
    quantize: Quantize | None
    thread: CommThread
    windows: list[Window] = field(default_factory=list)
    regions: list[Region] = field(default_factory=list)
    slots: list[list[Slot]] = field(default_factory=list)
    ahead: list[Settling] = field(default_factory=list)
    spared_nbytes: int = 0
    is_shared: bool = False
    memory: MemoryLedger = field(default_factory=MemoryLedger)
    times: PhaseTimes = field(default_factory=PhaseTimes)
    nonfinite: NonFinite = "raise"
    refreshes_ahead: bool = False
    reshards_last: bool = True
    attendance: Attendance = field(init=False)

    def __post_init__(self) -> None:
        """Let all ranks take part."""
        self.attendance = Attendance(self.world)

    def settle(self) -> None:
        """Let go of what was gathered ahead or has stayed, and wait for all communication that was started."""
        while self.ahead:
            self.ahead.pop().settle()
        self.thread.drain()

    def free_slots(self) -> None:
        """Give back the memory of slots that this rank has for itself and does not use now."""
        for slots in self.slots:
            for slot in slots:
                self.memory.add("buffers", -slot.free())
