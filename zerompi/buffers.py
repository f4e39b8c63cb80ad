"""The model's own buffers (batch norm statistics and the like): rank 0's are the model's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor, nn

from zerompi.collectives.broadcast import broadcast
from zerompi.collectives.group import Group


class _Owner(NamedTuple):
    """A module that has buffers, and the version of each when it was last sent."""

    module: nn.Module
    seen: dict[str, tuple[int, int]]


class ModuleBuffers:
    """Keeps the buffers of all ranks equal to rank 0's, sending only those of modules that changed one.

    Whether a buffer has changed is seen from its version counter, which torch's in-place operations
    increment; a buffer that never changes (a mask, a table of frequencies) is sent once. The unit
    of sending is the module because batch norm updates its statistics without incrementing their
    counters, but increments that of `num_batches_tracked` beside them.
    """

    def __init__(self, model: nn.Module, world: Group) -> None:
        self.world = world
        self._owners = [_Owner(module, {}) for module in model.modules() if module._buffers]

    def synchronise(self, *, everything: bool = False) -> None:
        """Broadcast rank 0's changed buffers, or all. Collective, if any has changed on any rank."""
        for module, seen in self._owners:
            buffers = {
                key: buffer
                for key, buffer in module._buffers.items()
                if buffer is not None and not buffer.is_meta
            }
            if not everything and seen == _versions(buffers):
                continue
            for buffer in buffers.values():
                self._broadcast(buffer)
            seen.clear()
            seen.update(_versions(buffers))

    def _broadcast(self, buffer: Tensor) -> None:
        if self.world.size == 1 or not buffer.numel():
            return
        values = buffer.detach().contiguous().clone()
        broadcast(values, values, self.world)
        buffer.detach().copy_(values)


def _versions(buffers: Mapping[str, Tensor]) -> dict[str, tuple[int, int]]:
    return {key: (id(buffer), buffer._version) for key, buffer in buffers.items()}
