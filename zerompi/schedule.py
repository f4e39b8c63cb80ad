"""In which order units are gathered, reduced and refreshed, and in which backward passes they are reduced."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence, Set
from math import fsum
from typing import NamedTuple

from zerompi.context import Context
from zerompi.errors import ZerompiError
from zerompi.gather import Gather
from zerompi.place import assign_regions
from zerompi.precision import LossScaler
from zerompi.refresh import Refresh
from zerompi.regions import Slot
from zerompi.unit import GradientScale, Unit, UnitState


class Accumulation:
    """Which backward passes communicate, and what the mean of gradients is taken over.

    Attributes:
        paused: how many contexts let gradients accumulate without communication.
        expected: passes of the surrounding `accumulate`, or None.
        seen: passes in it so far.
        weight: how many samples the loss of the running pass is a mean over; None: passes count alike.
    """

    def __init__(self, context: Context) -> None:
        self._context = context
        self.paused = 0
        self.expected: int | None = None
        self.seen = 0
        self.weight: float | None = None
        self._weights: list[float | None] = []  # of passes that are not reduced yet
        self._divisor: float | None = None

    @property
    def count(self) -> int:
        """Over how many passes the mean is taken."""
        return 1 if self.expected is None else self.expected

    @property
    def communicates(self) -> bool:
        """Whether the running, or next, backward pass reduces gradients."""
        return not self.paused and self.seen + 1 >= self.count

    @property
    def factor(self) -> float:
        """How often a gradient of the running pass counts in the bucket."""
        return 1.0 if self.weight is None else self.weight

    def end_pass(self) -> None:
        """A pass has brought gradients."""
        self._weights.append(self.weight)
        if self.expected is not None:
            self.seen += 1

    def forget(self) -> None:
        """What was collected is reduced, or dropped."""
        self._weights.clear()
        self._divisor = None

    @property
    def is_weighted(self) -> bool:
        """Whether passes count by what they were a mean over."""
        if self.weight is not None or self._context.attendance.is_open:
            return True
        return self._weights.count(None) < len(self._weights)

    def divisor(self) -> float:
        """What the sum of all ranks' gradients is divided by. Collective if passes are weighted.

        Then it is the sum of the weights of all ranks. Passes of `no_sync` add up, as they do without
        weights, so of these a rank's mean weight counts.

        Raises:
            ZerompiError: no rank has samples.
        """
        attendance, world = self._context.attendance, self._context.world
        if not self.is_weighted:
            return float(world.size * self.count)
        if self._divisor is None:
            weights = [*self._weights, self.weight]
            own = fsum(1.0 if weight is None else weight for weight in weights)
            if attendance.is_following:
                own = 0.0
            elif self.expected is None:
                own /= len(weights)
            everyone = world.gather_words(_as_bits(own))
            self._divisor = fsum(map(_from_bits, everyone))
            if not self._divisor:
                raise ZerompiError(
                    "weighted: expected samples on some rank, got a weight of 0 on all"
                )
        return self._divisor


class MeanScale:
    """What a sum of gradients is multiplied by: the mean over ranks and passes, and no loss scale."""

    def __init__(self, accumulation: Accumulation, scaler: LossScaler | None) -> None:
        self._accumulation = accumulation
        self._scaler = scaler

    @property
    def is_weighted(self) -> bool:
        """See `GradientScale`."""
        return self._accumulation.is_weighted

    def __call__(self) -> float:
        """See `GradientScale`."""
        divisor = self._accumulation.divisor()
        if self._scaler is not None:
            divisor *= self._scaler.scale
        return 1.0 / divisor


def _as_bits(value: float) -> int:
    return int(struct.unpack("<Q", struct.pack("<d", value))[0])


def _from_bits(bits: int) -> float:
    return float(struct.unpack("<d", struct.pack("<Q", bits))[0])


class _Order(NamedTuple):
    """In which order units are unsharded in one pass.

    Attributes:
        units: each as often as it is unsharded.
        released: the positions in `units` after which the unit was resharded in the forward; none
            where nothing shall stay.
        stays: those of them after which it need not be, as it still lies there when it is used next.
        batches: what is gathered, in order, cut into units that are gathered together: as far as a slot
            holds them.
        begins: position -> the batches that are gathered when it comes, by number: the one that begins
            there, if any, and the next.
    """

    units: list[Unit]
    released: Set[int]
    stays: Set[int]
    batches: list[list[Unit]]
    begins: dict[int, tuple[int, ...]]


_UNKNOWN = _Order([], frozenset(), frozenset(), [], {})


class Gathers:
    """Gathers units ahead of their use, in the order in which they were used before.

    A *pass* begins with each forward of the model, and goes on until the next one. The order in which
    units are unsharded in it, forward and backward, is kept, and expected of the pass at the same place of the
    next step. Units that follow each other form a batch, gathered together, as long as they
    are small, of one depth and different. When the first unit of a batch is about to be used, the next
    batch is started. A pass that leaves the expected order goes on without.

    What a forward uses last, backward uses first: unless the context `reshards_last`, a unit *stays*,
    hidden, if it is used again before another batch of its depth. So of each depth there are never more
    than two batches, which is what its slots hold: one in use or staying, and one that nobody uses yet.

    All ranks have gathered the same units in the same order (each gather makes sure of it), so they
    expect the same.
    """

    _MAX_PASSES = 16  # passes of a step with an order of their own

    def __init__(self, context: Context) -> None:
        self._context = context
        self._known: dict[tuple[bool, int], _Order] = {}
        self._pass = (False, 0)
        self._expected = _UNKNOWN
        self._seen: list[Unit] = []
        self._latest: dict[Unit, int] = {}  # where in `_seen` a unit is the last time
        self._released: set[int] = set()
        self._count = 0  # passes since the last step

    def begin(self, *, with_grad: bool) -> None:
        """A forward of the model begins, which records gradients or not."""
        self._learn()
        self._count = min(self._count + 1, self._MAX_PASSES)
        self._pass = (with_grad, self._count)
        self._expected = self._known.get(self._pass, _UNKNOWN)

    def end_of_step(self) -> None:
        """The parameters have changed."""
        self._learn()
        self._count = 0

    def forget(self) -> None:
        """Expect nothing any more: ranks have run different passes."""
        self.end_of_step()
        self._known.clear()

    def _learn(self) -> None:
        self._context.settle()
        known = self._known.get(self._pass, _UNKNOWN)
        if self._seen and (self._seen, self._released) != (known.units, known.released):
            self._known[self._pass] = _make_order(self._seen, self._released, self._context.slots)
        self._seen, self._latest, self._released = [], {}, set()
        self._expected = _UNKNOWN

    def unshard(self, unit: Unit) -> None:
        """Make the full parameters of `unit` visible; start to gather those that come next."""
        if unit.state is not UnitState.SHARDED or not unit.segments:
            unit.unshard()
            return
        position, expected = len(self._seen), self._expected
        if expected is not _UNKNOWN:
            units = expected.units
            if position >= len(units) or units[position] is not unit:
                self._context.settle()
                self._expected = expected = _UNKNOWN
        try:
            for number in expected.begins.get(position, ()):
                self._start(number)
            unit.unshard()
        except BaseException:
            self._expected = _UNKNOWN
            raise
        self._latest[unit] = position
        self._seen.append(unit)

    def reshard(self, unit: Unit, *, expect_next: bool) -> None:
        """Free the full parameters, unless they stay; gather them again if they come next.

        Not with `expect_next` False: the forward has failed.
        """
        before = unit.state
        if not expect_next:
            self._expected = _UNKNOWN
        position = self._latest.get(unit)
        unit.reshard(stays=position in self._expected.stays)
        if unit.state is before or not unit.segments:
            return  # somebody holds it
        if position is not None and not self._context.reshards_last:
            self._released.add(position)
        for number in self._expected.begins.get(len(self._seen), ())[:1]:
            self._start(number)

    def _start(self, number: int) -> None:
        """Gather those units of a batch that nobody has gathered yet."""
        if number < len(self._expected.batches):
            batch = [unit for unit in self._expected.batches[number] if unit.is_free]
            if batch:
                Gather(batch, self._context, ahead=True)


def _make_order(units: list[Unit], released: Set[int], slots: Sequence[Sequence[Slot]]) -> _Order:
    stays: set[int] = set()
    batches: list[list[Unit]] = []
    begins: dict[int, tuple[int, ...]] = {}
    latest: dict[Unit, int] = {}  # where a unit is used last, so far
    in_slot: dict[int, list[Unit]] = {}  # depth -> its last batch, so far
    batch: list[Unit] = []  # that may grow
    nbytes = 0
    for position, unit in enumerate(units):
        before = latest.get(unit)
        latest[unit] = position
        if before is not None and before in released and unit in in_slot[unit.depth]:
            stays.add(before)
            begins[position] = (len(batches),)
            batch = []
            continue
        fits = (
            bool(batch)
            and unit.slot is None
            and unit.depth == batch[0].depth
            and nbytes + unit.slot_nbytes <= slots[unit.depth][0].nbytes
            and unit not in batch
        )
        if fits:
            batch.append(unit)
            nbytes += unit.slot_nbytes
        else:
            begins[position] = (len(batches), len(batches) + 1)
            batch = in_slot[unit.depth] = [unit]
            batches.append(batch)
            nbytes = unit.slot_nbytes
    return _Order(units, released, stays, batches, begins)


def _reordered(units: Sequence[Unit], seen: Iterable[Unit], context: Context) -> list[Unit]:
    """`units`, those first that the first rank has `seen`, in its order. Collective over the world."""
    first = [units.index(unit) for unit in seen if unit in units]
    rest = [index for index in range(len(units)) if index not in first]
    root = context.attendance.first
    order: list[int] = context.world.comm.bcast(first + rest, root=root)
    return [units[index] for index in order]


class Reductions:
    """Reduces units in one order that is the same on all ranks.

    A unit is reduced when it is ready and all units before it in the order are reduced. The order
    is at first the reverse of the model's, and after the first pass that reduces the one in which
    units became ready on rank 0. So ranks never wait for each other crosswise, even if they use
    different parameters.
    """

    def __init__(self, units: Sequence[Unit], context: Context) -> None:
        self.world = context.world
        self._units = units
        self._context = context
        self.order = [unit for unit in reversed(units) if unit.trainable]
        assign_regions(units, self.order, context)
        self._learned = False
        self._ready: dict[Unit, None] = {}  # in the order in which they came
        self._next = 0

    def ready(self, unit: Unit, scale: GradientScale) -> None:
        """Note that `unit` has all its gradients; reduce what may be reduced now."""
        if unit in self._ready:
            return
        self._ready[unit] = None
        while self._next < len(self.order) and self.order[self._next] in self._ready:
            self._next += 1
            self.order[self._next - 1].reduce(scale)

    def finish(self, scale: GradientScale) -> None:
        """Reduce everything that is left at the end of a backward pass. Collective over the world."""
        for unit in self.order[self._next :]:
            unit.reduce(scale)
        self._settle()
        self._context.settle()
        # Gradients may have come after their unit was reduced: a unit that several reentrant
        # checkpoints run gets its gradient in several parts.
        while self.goes_on():
            for unit in self.order:
                unit.reduce(scale)
            self._settle()
        self.conclude()

    def goes_on(self) -> bool:
        """Whether any rank has gradients left at the end of a backward pass. Collective over the world."""
        self._context.attendance.announce("end of backward", "end_of_backward")
        return any(self.world.agree("end of backward", int(self._has_gradients())))

    def conclude(self) -> None:
        """All ranks have reduced everything. Collective over the world."""
        if not self._learned:
            self._learn()
        self.reset()

    def reset(self) -> None:
        """Forget the running backward pass."""
        self._ready.clear()
        self._next = 0

    def _settle(self) -> None:
        try:
            for unit in self.order:
                unit.settle()
        except BaseException:
            for unit in self.order:
                unit.abandon_reduction()
            raise

    def _has_gradients(self) -> bool:
        return any(unit.has_gradients for unit in self.order)

    def _learn(self) -> None:
        self.order = _reordered(self.order, self._ready, self._context)
        assign_regions(self._units, self.order, self._context)
        self._learned = True


class Refreshes:
    """Refreshes units after a step beside what follows, in the order in which forwards use them.

    The order is at first the model's, and after the first step the one in which rank 0 has used units
    before it.
    """

    def __init__(self, units: Sequence[Unit], context: Context) -> None:
        self._context = context
        self.order = [
            unit for unit in units if any(segment.refresh_gathers for segment in unit.trainable)
        ]
        self._used: dict[Unit, None] | None = {}  # None: the order is known

    @property
    def are_ahead(self) -> bool:
        """Whether a step leaves refreshes to the communication thread."""
        return self._context.refreshes_ahead and self._context.thread.overlaps and bool(self.order)

    @property
    def are_pending(self) -> bool:
        """Whether there is a unit that nobody has used since it is being refreshed."""
        return any(unit.state is UnitState.REFRESHING for unit in self.order)

    def start(self) -> None:
        """Refresh all units, once nothing else is under way. Collective over the world."""
        if self._used is not None:
            self.order = _reordered(self.order, self._used, self._context)
            self._used = None
        for unit in self.order:
            Refresh(unit, self._context)

    def use(self, unit: Unit) -> None:
        """Wait until `unit`, which is about to be read, is refreshed."""
        if self._used is not None:
            self._used[unit] = None
        if unit.state is UnitState.REFRESHING:
            unit.unshard()

    def finish(self) -> None:
        """Wait until all units are refreshed."""
        for unit in self.order:
            if unit.state is UnitState.REFRESHING:
                unit.unshard()
