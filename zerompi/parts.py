"""What a partition consists of, for all that works on it as a whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from zerompi import linear
from zerompi import state as states
from zerompi.context import Context
from zerompi.errors import ZerompiError
from zerompi.hooks import Hooks
from zerompi.optimizer import PieceOptimizer
from zerompi.schedule import Refreshes
from zerompi.unit import Unit


class Parts:
    """A partitioned model, and what makes it train; `end_of_step` is called after each optimizer step.

    Attributes:
        scaler: of the loss; None without loss scaling.
        aliases: other names of tied parameters -> the name under which they are kept.
        state_keys: names of the model's state dict before the partition, in order.
        without_values: names of tensors that were on the meta device and have no values yet.
        linears: the linear layers that write gradients into buckets.
        is_closed: whether the partition has ended.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None,
        units: Sequence[Unit],
        context: Context,
        without_values: set[str],
        end_of_step: Callable[[], None],
    ) -> None:
        self.model = model
        self.units = list(units)
        self.context = context
        self.scaler = context.precision.make_scaler()
        self.aliases = states.aliases(model, units)
        self.state_keys = list(model.state_dict(keep_vars=True))
        self.without_values = without_values
        refreshes = Refreshes(units, context)
        self.piece_optimizer = PieceOptimizer(
            optimizer, units, context, self.scaler, refreshes, end_of_step
        )
        self.hooks = Hooks(model, units, context, self.scaler, refreshes)
        self.hooks.buffers.synchronise()
        self.linears = list(linear.install(model, units))
        self.is_closed = False

    @property
    def optimizer(self) -> Optimizer | None:
        """The user's, which steps the pieces."""
        return self.piece_optimizer.optimizer

    def units_of(self, module: nn.Module) -> list[Unit]:
        """The units with parameters of `module`.

        Raises:
            ValueError: it is not part of the model.
        """
        if not any(module is known for known in self.model.modules()):
            raise ValueError(f"module: expected a module of the model, got {type(module).__name__}")
        wanted = {id(parameter) for parameter in module.parameters()}
        return [
            unit
            for unit in self.units
            if any(wanted.intersection(segment.index_of) for segment in unit.segments)
        ]

    def check_open(self) -> None:
        """Refuse what comes after the end.

        Raises:
            ZerompiError: the partition is closed.
        """
        if self.is_closed:
            raise ZerompiError("this partition is closed")

    def agree(self, what: str, operation: str | None = None, *arguments: Any) -> None:
        """Make sure that all ranks are about to do the same. Collective over the world.

        Args:
            what: for people.
            operation: what ranks do that have nothing more to do inside `join`; None is refused there.
            arguments: for them.

        Raises:
            ZerompiError: the partition is closed, or the call is refused inside `join`.
            MismatchError: a rank does something else.
        """
        self.check_open()
        self.hooks.let_go()
        self.context.settle()
        attendance = self.context.attendance
        if operation is None and attendance.is_open and not attendance.is_following:
            raise ZerompiError(f"{what}: expected to be outside of join(), got a call inside it")
        attendance.announce(what, operation or "", *arguments)
        self.context.world.agree(what)

    def synchronise_buffers(self) -> None:
        """Give all ranks rank 0's buffers. Collective over the world."""
        self.check_open()
        self.context.settle()
        self.hooks.buffers.synchronise()
