"""Going along with the ranks that still have batches: the other side of `attendance.py`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch

from zerompi.context import Context
from zerompi.errors import ZerompiError
from zerompi.gather import Gather
from zerompi.hooks import Hooks
from zerompi.optimizer import PieceOptimizer
from zerompi.unit import Unit


class Stateful(Protocol):
    """Has a state that can be given away: an LR scheduler, say."""

    def state_dict(self) -> dict[str, Any]:
        """The state."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it over."""


class Follower:
    """Takes this rank's part in what the active ranks announce, with no batch of its own.

    What it runs is what the active ranks run: the same reduction with an empty bucket, the same step of
    the user's optimizer.

    Args:
        units: of the partition.
        context: of the partition.
        hooks: of the partition.
        optimizer: of the partition.
        methods: of the partition, that the active ranks may call.
    """

    def __init__(
        self,
        units: Sequence[Unit],
        context: Context,
        hooks: Hooks,
        optimizer: PieceOptimizer,
        methods: Mapping[str, Callable[..., Any]],
    ) -> None:
        self._units = {unit.name: unit for unit in units}
        self._context = context
        self._hooks = hooks
        self._optimizer = optimizer
        self._operations: dict[str, Callable[..., Any]] = {
            "gather": self._gather,
            "reduce": self._reduce,
            "end_of_backward": self._end_of_backward,
            "buffers": hooks.buffers.broadcast,
            "clip": optimizer.clip_grad_norm_,
            "step": self._step,
            "agree": context.world.agree,
            **methods,
        }

    def follow(self) -> None:
        """Go along until all ranks do. Collective over the world.

        Raises:
            ZerompiError: gradients of this rank wait to be reduced.
            MismatchError: the others disagree on what comes next.
        """
        if any(unit.has_gradients for unit in self._units.values()):
            raise ZerompiError(
                "join: expected no gradients that wait for another backward pass, got some: end with a "
                "pass outside no_sync()"
            )
        self._context.settle()
        attendance = self._context.attendance
        while (heard := attendance.listen()) is not None:
            operation, arguments = heard
            with attendance.following(), torch.no_grad():
                self._operations[operation](*arguments)

    def _gather(self, names: Sequence[str], slot_number: int) -> None:
        units = [self._units[name] for name in names]
        Gather(units, self._context, ahead=False, slot_number=slot_number).pass_on()

    def _reduce(self, name: str) -> None:
        unit = self._units[name]
        unit.reduce(self._hooks.gradient_scale)
        unit.settle()

    def _end_of_backward(self) -> None:
        if not self._hooks.reductions.goes_on():
            self._hooks.reductions.conclude()
            self._hooks.accumulation.forget()
            self._hooks.measure_gradients()

    def _step(self, settings: Sequence[Mapping[str, Any]]) -> None:
        optimizer = self._optimizer.optimizer
        assert optimizer is not None  # nobody else announces a step
        self._optimizer.apply_settings(settings)
        optimizer.step()

    def catch_up(self, schedulers: Sequence[Stateful]) -> None:
        """Take over what the ranks that were active last have and this one has missed. Collective."""
        attendance, comm = self._context.attendance, self._context.world.comm
        is_late = comm.rank not in attendance.active
        state = self._optimizer.settings(), [scheduler.state_dict() for scheduler in schedulers]
        settings, states = comm.bcast(state, root=attendance.first)
        if is_late:
            for scheduler, taken in zip(schedulers, states, strict=True):
                scheduler.load_state_dict(taken)
            self._optimizer.apply_settings(settings)
        buffers = self._hooks.buffers
        changed = sorted(set().union(*comm.allgather(buffers.changed())))
        if changed:
            buffers.broadcast(changed)
        self._hooks.gathers.forget()
