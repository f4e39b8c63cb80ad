"""The checkpoints of a partition: `save`, `wait_for_save` and `load` of `Zero`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from zerompi import restore
from zerompi import state as states
from zerompi.activity import phase
from zerompi.agreement import agreement
from zerompi.checkpoint import (
    BackgroundSaves,
    CheckpointReader,
    WriteOptions,
    open_draft,
    write_checkpoint,
)
from zerompi.errors import ZerompiError
from zerompi.generators import generator_states
from zerompi.parts import Parts

_log = logging.getLogger("zerompi")


@dataclass(frozen=True)
class SaveOptions:
    """The arguments of `Zero.save`, documented there.

    Raises:
        ValueError: one is out of its range.
    """

    extra: Mapping[str, Any] | None
    blocking: bool
    if_pending: str
    keep: int
    include: Sequence[str | PathLike[str]]
    max_shard_size: int

    def __post_init__(self) -> None:
        if self.if_pending not in ("wait", "refuse"):
            raise ValueError(f"if_pending: expected 'wait' or 'refuse', got {self.if_pending!r}")
        for name, least in (("keep", 0), ("max_shard_size", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name}: expected a number of at least {least}, got {value!r}")

    @property
    def of_writing(self) -> WriteOptions:
        """What the files depend on."""
        return WriteOptions(self.max_shard_size, self.keep, [Path(file) for file in self.include])


class Checkpoints:
    """Writes and reads checkpoints of a partition; the methods are documented in `Zero`.

    Attributes:
        skipped: what the last load has not loaded and why, one sentence each.
    """

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._comm = parts.context.world.comm
        self.background = BackgroundSaves(self._comm, parts.context.memory)
        self.skipped: list[str] = []

    @phase("save")
    def save(self, path: str | PathLike[str], options: SaveOptions) -> None:
        """See `Zero.save`."""
        parts = self._parts
        parts.synchronise_buffers()
        parts.agree(f"save of {path}", "save", path, options)
        self._make_way(options.if_pending)
        rng = self._comm.gather(generator_states(), root=0)
        with agreement(self._comm):
            model = states.model_table(parts.model, parts.units)
            optimizer = states.optimizer_table(parts.optimizer, parts.units)
            rest = {
                "extra": dict(options.extra or {}),
                "optimizer": states.plain_optimizer_state(parts.optimizer, parts.units),
                "loss_scaler": None if parts.scaler is None else parts.scaler.state_dict(),
                "rng": rng,
            }
            if not options.blocking:
                model, optimizer = self.background.copies.take([model, optimizer])
        arguments = Path(path), model, optimizer, rest, self._comm, options.of_writing
        if options.blocking:
            write_checkpoint(*arguments)
        else:
            self.background.begin(open_draft(*arguments), rest)

    def _make_way(self, if_pending: str) -> None:
        if if_pending == "refuse" and any(self._comm.allgather(self.background.is_pending)):
            raise ZerompiError("save: expected no save to be going on, got one in the background")
        self.background.finish()

    def wait(self) -> None:
        """See `Zero.wait_for_save`."""
        self._parts.agree("wait_for_save")
        self.background.finish()

    @phase("load")
    def load(
        self, path: str | PathLike[str], names: Callable[[str], str | None] | None, strict: bool
    ) -> dict[str, Any]:
        """See `Zero.load`."""
        parts = self._parts
        parts.agree(f"load(strict={strict})")
        self.background.finish()
        with ExitStack() as stack:
            with agreement(self._comm):
                reader = stack.enter_context(CheckpointReader(Path(path), names=names))
                plan = restore.plan(reader, parts, strict=strict)
            with agreement(self._comm):
                restoration = restore.read(reader, parts, plan)
        extra = restoration.extra
        restoration.apply(parts)
        parts.hooks.release_kept()
        parts.piece_optimizer.refresh(everything=True)
        self._note_loaded(plan)
        return extra

    def _note_loaded(self, plan: restore.Plan) -> None:
        loaded = set(plan.match.stored)
        loaded.update(alias for alias, name in self._parts.aliases.items() if name in loaded)
        self._parts.without_values -= loaded
        self.skipped = plan.skipped
        if self.skipped and self._comm.rank == 0:
            _log.warning("load(strict=False) skipped: %s", "; ".join(self.skipped[:20]))
