"""Units: parameters that are gathered together, and their state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum

import torch
from torch import nn

from zerompi.errors import ZerompiError
from zerompi.placement import Placement
from zerompi.segment import Context, Segment
from zerompi.units import UnitPlan

_FLAGS_PER_HEADER = 64


class UnitState(Enum):
    """What a unit's parameters cost in memory now."""

    SHARDED = "one shard per rank: Psi / N"
    UNSHARDED = "full parameters on every rank: Psi"


class Unit:
    """The parameters of one module that are gathered together.

    Attributes:
        holds: how many callers need the full parameters now (a running forward, `gathered`, a kept
            graph of a double backward); `reshard` does nothing before it is zero.
    """

    def __init__(self, plan: UnitPlan, context: Context) -> None:
        self.name = plan.name or "(root)"
        self.module = plan.module
        self.context = context
        kinds: dict[tuple[torch.dtype, bool], list[tuple[str, nn.Parameter]]] = {}
        for name, parameter in plan.parameters:
            kinds.setdefault((parameter.dtype, parameter.requires_grad), []).append(
                (name, parameter)
            )
        self.segments = [Segment(members, context) for members in kinds.values()]
        self.trainable = [segment for segment in self.segments if segment.trainable]
        self.holds = 0
        self._lent = False
        self._sharded = context.stage.parameter is Placement.SHARD
        self.state = UnitState.SHARDED if self._sharded else UnitState.UNSHARDED

    def unshard(self) -> None:
        """Make the full parameters visible. Collective over the world unless they are already."""
        if self._lent:
            raise ZerompiError(
                f"{self.name}: forward inside gathered(writable=True); leave the context first"
            )
        if self.state is UnitState.UNSHARDED:
            return
        if self.segments:
            with self.context.times.phase("all_gather"):
                self.context.world.agree(f"all-gather of the parameters of {self.name}")
                for segment in self.segments:
                    segment.unshard()
        self.state = UnitState.UNSHARDED

    def reshard(self) -> None:
        """Free the full parameters unless somebody still holds them."""
        if not self._sharded or self.holds or self.state is UnitState.SHARDED:
            return
        for segment in self.segments:
            segment.reshard()
        self.state = UnitState.SHARDED

    @property
    def is_hidden(self) -> bool:
        """Whether the parameters read as NaN now."""
        return self.state is UnitState.SHARDED and not self._lent

    @property
    def has_gradients(self) -> bool:
        """Whether a gradient of this rank waits to be reduced."""
        return any(segment.bucket is not None for segment in self.trainable)

    @property
    def is_complete(self) -> bool:
        """Whether the running backward pass has brought all gradients that are expected of it."""
        return all(segment.collected >= segment.expected for segment in self.trainable)

    def reduce(self, scale: float) -> None:
        """Reduce the gradients of all ranks and install them; nothing moves if no rank has any.

        Collective over the world. A parameter without a gradient on any rank keeps `grad` as it is.
        """
        with self.context.times.phase("reduce"):
            used = self._used_anywhere()
            start = 0
            for segment in self.trainable:
                part = used[start : start + len(segment.present)]
                start += len(segment.present)
                if any(part):
                    segment.reduce(part, scale)

    def _used_anywhere(self) -> list[bool]:
        """For each trainable parameter, whether any rank has a gradient for it."""
        present = [flag for segment in self.trainable for flag in segment.present]
        used: list[bool] = []
        for start in range(0, len(present), _FLAGS_PER_HEADER):
            part = present[start : start + _FLAGS_PER_HEADER]
            flags = sum(1 << bit for bit, flag in enumerate(part) if flag)
            union = 0
            for others in self.context.world.agree(
                f"reduction of the gradients of {self.name}", flags
            ):
                union |= others
            used.extend(bool(union >> bit & 1) for bit in range(len(part)))
        return used

    @contextmanager
    def main_weights(self) -> Iterator[None]:
        """Let the parameters be the full main weights while the context lasts. Collective.

        Rank 0's values are taken over at the end.
        """
        values = []
        for segment in self.segments:
            flat = segment.main_values()
            segment.install(flat)
            values.append(flat)
        self._lent = True
        try:
            yield
        finally:
            self._lent = False
            for segment in self.segments:
                if self.state is UnitState.UNSHARDED:
                    segment.install(segment.full.tensor)
                else:
                    segment.hide()
        for segment, flat in zip(self.segments, values, strict=True):
            segment.set_values(flat)
