"""`zero_grad` of a partitioned model and of its optimizer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from zerompi import state as states
from zerompi.parts import Parts


class ZeroGrad:
    """Replaces `model.zero_grad` until `remove`; inside `join`, ranks that go along are told of both."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._zero_grad = parts.model.zero_grad
        parts.model.zero_grad = self._of_pieces  # type: ignore[method-assign]

    def remove(self) -> None:
        """Give the model its own method back."""
        self._parts.model.zero_grad = self._zero_grad  # type: ignore[method-assign]

    @contextmanager
    def announced(self) -> Iterator[None]:
        """While the context lasts, other ranks are told when this one calls `optimizer.zero_grad`."""
        optimizer = self._parts.optimizer
        if optimizer is None:
            yield
            return
        own = vars(optimizer)
        earlier, zero_grad = own.get("zero_grad"), optimizer.zero_grad

        def announce_and_zero_grad(set_to_none: bool = True) -> None:
            self._announce("optimizer", set_to_none)
            zero_grad(set_to_none)

        own["zero_grad"] = announce_and_zero_grad
        try:
            yield
        finally:
            del own["zero_grad"]
            if earlier is not None:
                own["zero_grad"] = earlier

    def follow(self, owner: str, set_to_none: bool) -> None:
        """What an announced `zero_grad` does on the ranks that are told."""
        optimizer = self._parts.optimizer
        if owner == "optimizer" and optimizer is not None:
            optimizer.zero_grad(set_to_none)
        else:
            self._parts.model.zero_grad(set_to_none)

    def _announce(self, owner: str, set_to_none: bool) -> None:
        context = self._parts.context
        if context.attendance.is_open:
            context.settle()
            context.attendance.announce(
                f"zero_grad of the {owner}", "zero_grad", owner, set_to_none
            )

    def _of_pieces(self, set_to_none: bool = True) -> None:
        """`model.zero_grad`: the gradients of a partitioned model hang on its pieces."""
        self._announce("model", set_to_none)
        self._zero_grad(set_to_none)
        for entry in states.entries(self._parts.units):
            if set_to_none or entry.piece.grad is None:
                entry.piece.grad = None
            else:
                entry.piece.grad.zero_()
