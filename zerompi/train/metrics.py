"""What a run writes down: JSON lines and TensorBoard; rank 0 only."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from tensorboardX import SummaryWriter  # type: ignore[import-untyped]


class MetricsLog:
    """OUT/metrics.jsonl and OUT/tensorboard.

    Each line is one object with "kind" ("train" or "eval") and "step"; numbers that are not finite
    read null.
    """

    def __init__(self, out: Path, first_step: int) -> None:
        """Open for steps from `first_step` on; what an earlier run wrote of these is dropped."""
        from tensorboardX import SummaryWriter

        path = out / "metrics.jsonl"
        _drop_from(path, first_step)
        self._file: TextIO = path.open("a", encoding="utf-8", buffering=1)
        board = out / "tensorboard"
        if first_step == 1:
            for old in board.glob("events.out.tfevents*"):
                old.unlink()
        purge = first_step if first_step > 1 else None
        self._board: SummaryWriter = SummaryWriter(str(board), purge_step=purge)

    def write(self, kind: str, step: int, **values: float) -> None:
        """Write one line, and one point of each value that is finite."""
        record: dict[str, Any] = {"kind": kind, "step": step}
        record.update({k: v if math.isfinite(v) else None for k, v in values.items()})
        self._file.write(json.dumps(record) + "\n")
        for name, value in values.items():
            if math.isfinite(value):  # tensorboardX prints a warning of its own for others
                self._board.add_scalar(f"{kind}/{name}", value, step)

    def text(self, name: str, text: str, step: int) -> None:
        """Show `text` in TensorBoard."""
        self._board.add_text(name, text, step)

    def close(self) -> None:
        """Flush and close both."""
        self._file.close()
        self._board.close()


def _drop_from(path: Path, first_step: int) -> None:
    """Keep the complete lines of steps before `first_step`, as a resumed run repeats the others."""
    kept = []
    if first_step > 1 and path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                step = json.loads(line)["step"]
            except (json.JSONDecodeError, KeyError):
                continue  # the last line of a killed run
            if step < first_step:
                kept.append(line + "\n")
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    os.replace(temporary, path)
