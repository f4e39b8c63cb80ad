"""In which order units reduce their gradients, and in which backward passes."""

from __future__ import annotations

from collections.abc import Sequence

from zerompi.place import assign_regions
from zerompi.segment import Context
from zerompi.unit import Unit


class Accumulation:
    """Which backward passes communicate, and over how many passes gradients are averaged."""

    def __init__(self) -> None:
        self.paused = 0
        self.expected: int | None = None  # passes of the surrounding accumulate(), if any
        self.seen = 0

    @property
    def count(self) -> int:
        """Over how many passes the mean is taken."""
        return 1 if self.expected is None else self.expected

    @property
    def communicates(self) -> bool:
        """Whether the running, or next, backward pass reduces gradients."""
        return not self.paused and self.seen + 1 >= self.count


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

    def ready(self, unit: Unit, scale: float) -> None:
        """Note that `unit` has all its gradients; reduce what may be reduced now."""
        self._ready[unit] = None
        while self._next < len(self.order) and self.order[self._next] in self._ready:
            self._next += 1
            self.order[self._next - 1].reduce(scale)

    def finish(self, scale: float) -> None:
        """Reduce everything that is left at the end of a backward pass. Collective over the world."""
        for unit in self.order[self._next :]:
            unit.reduce(scale)
        self._settle()
        # Gradients may have come after their unit was reduced: a unit that several reentrant
        # checkpoints run gets its gradient in several parts.
        while any(self.world.agree("end of backward", int(self._has_gradients()))):
            for unit in self.order:
                unit.reduce(scale)
            self._settle()
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
        seen = [self.order.index(unit) for unit in self._ready]
        rest = [index for index in range(len(self.order)) if index not in seen]
        order: list[int] = self.world.comm.bcast(seen + rest, root=0)
        self.order = [self.order[index] for index in order]
        assign_regions(self._units, self.order, self._context)
        self._learned = True
