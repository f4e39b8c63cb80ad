"""The model's own buffers (batch norm statistics and the like): rank 0's are the model's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from zerompi.attendance import Attendance
from zerompi.collectives.broadcast import broadcast
from zerompi.collectives.group import Group


class _Owner(NamedTuple):
    """A module, and the version of each of its buffers when it was last sent."""

    module: nn.Module
    seen: dict[str, tuple[Tensor, int]]


class ModuleBuffers:
    """Keeps the buffers of all ranks equal to rank 0's, sending only those of modules that changed one.

    Whether a buffer has changed is seen from its version counter, which torch's in-place operations
    increment; a buffer that never changes (a mask, a table of frequencies) is sent once. The unit
    of sending is the module because batch norm updates its statistics without incrementing their
    counters, but increments that of `num_batches_tracked` beside them.
    """

    def __init__(self, model: nn.Module, world: Group, attendance: Attendance) -> None:
        self.world = world
        self._attendance = attendance
        self._owners = [_Owner(module, {}) for module in model.modules()]

    def synchronise(self, *, everything: bool = False) -> None:
        """Broadcast rank 0's changed buffers, or all.

        Collective where any has changed; ranks change the same ones, or get MismatchError. Inside `join`
        the first active rank stands in for rank 0.
        """
        chosen = range(len(self._owners)) if everything else self.changed()
        if chosen:
            self._attendance.announce(f"buffers of modules {list(chosen)}", "buffers", list(chosen))
            self.broadcast(chosen)

    def changed(self) -> list[int]:
        """Which modules have changed a buffer since it was sent, in the order of `model.modules()`."""
        return [
            index
            for index, (module, seen) in enumerate(self._owners)
            if (module._buffers or seen) and not _unchanged(_buffers_of(module), seen)
        ]

    def broadcast(self, chosen: Sequence[int]) -> None:
        """Send the buffers of these modules. Collective."""
        for module, seen in (self._owners[index] for index in chosen):
            buffers = _buffers_of(module)
            for key, buffer in buffers.items():
                if not buffer.is_contiguous():  # perhaps expanded: elements share memory
                    module._buffers[key] = buffers[key] = buffer.detach().contiguous()
                self._broadcast(buffers[key])
            seen.clear()
            seen.update({key: (buffer, buffer._version) for key, buffer in buffers.items()})

    def _broadcast(self, buffer: Tensor) -> None:
        if self.world.size == 1 or not buffer.numel():
            return
        values = buffer.detach().clone()
        broadcast(values, values, self.world, root=self._attendance.first)
        buffer.detach().copy_(values)


def _buffers_of(module: nn.Module) -> dict[str, Tensor]:
    return {
        key: buffer
        for key, buffer in module._buffers.items()
        if buffer is not None and not buffer.is_meta
    }


def _unchanged(buffers: Mapping[str, Tensor], seen: Mapping[str, tuple[Tensor, int]]) -> bool:
    return buffers.keys() == seen.keys() and all(
        seen[key][0] is buffer and seen[key][1] == buffer._version
        for key, buffer in buffers.items()
    )
