"""The model's own buffers (batch norm statistics and the like): rank 0's are the model's."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from zerompi.collectives.broadcast import broadcast
from zerompi.collectives.group import Group


class _Entry(NamedTuple):
    name: str
    module: nn.Module
    key: str


class ModuleBuffers:
    """Keeps the buffers of all ranks equal to rank 0's, sending only those that have changed.

    Whether a buffer has changed is seen from its version counter, which every in-place operation of
    torch increments; a buffer that never changes (a mask, a table of frequencies) is sent once.
    """

    def __init__(self, model: nn.Module, world: Group) -> None:
        self.world = world
        self._entries = [
            _Entry(f"{prefix}.{key}" if prefix else key, module, key)
            for prefix, module in model.named_modules()
            for key in module._buffers
        ]
        self._seen: dict[str, tuple[int, int]] = {}

    def synchronise(self, *, everything: bool = False) -> None:
        """Broadcast rank 0's changed buffers, or all. Collective, if any has changed on any rank."""
        for name, module, key in self._entries:
            buffer = module._buffers.get(key)
            if buffer is None or buffer.is_meta:
                continue
            if everything or self._seen.get(name) != (id(buffer), buffer._version):
                self._broadcast(buffer)
                self._seen[name] = (id(buffer), buffer._version)

    def _broadcast(self, buffer: Tensor) -> None:
        if self.world.size == 1 or not buffer.numel():
            return
        values = buffer.detach().contiguous().clone()
        broadcast(values, values, self.world)
        buffer.detach().copy_(values)
