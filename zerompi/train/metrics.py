"""What a run writes down: JSON lines, TensorBoard and a summary; rank 0 only.

A disk that is full, or fails in another way, does not end the training for the sake of metrics: the weights of
hours are worth more than a curve, room may be made meanwhile, and what must not be lost, a checkpoint, says
so by itself. One line tells which file lacks something; what comes once there is room is in it again.
"""

from __future__ import annotations

import json
import logging
import math
import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tensorboardX import SummaryWriter  # type: ignore[import-untyped]

_log = logging.getLogger("zerompi")

_ENOUGH = 8192  # bytes that wait to be written
_SCHEME = "zerompi-records"  # before paths that tensorboardX is to write through `_Board`


class WholeRecords:
    """A file of records that are there whole or not at all, whatever the disk does.

    Args:
        path: of the file; emptied, unless `appends`.
        appends: whether to go on behind what is there.

    Raises:
        OSError: it cannot be opened; from the constructor only.
    """

    def __init__(self, path: Path, *, appends: bool) -> None:
        self._path = path
        self._file = open(path, "ab" if appends else "wb", buffering=0)  # noqa: SIM115
        self._nbytes = path.stat().st_size  # of whole records
        self._has_failed = False

    def append(self, record: bytes) -> None:
        """Write a record; drop it if there is no room, and say so the first time."""
        try:
            left = memoryview(record)
            while left:
                left = left[self._file.write(left) :]
            self._nbytes += len(record)
        except OSError as error:
            with suppress(OSError):
                self._file.truncate(self._nbytes)
                self._file.seek(self._nbytes)
            if not self._has_failed:
                _log.warning(
                    "%s: %s; training goes on without what cannot be written there",
                    self._path,
                    error.strerror or error,
                )
            self._has_failed = True

    def close(self) -> None:
        """Close the file."""
        with suppress(OSError):  # of a network file system, which tells late
            self._file.close()


class _Board:
    """What tensorboardX writes into, a record in several calls: collects them, and writes whole ones.

    A thread of tensorboardX would end at an exception, and the run wait for it for ever.
    """

    def __init__(self, path: str) -> None:
        self._records = WholeRecords(Path(path.removeprefix(f"{_SCHEME}:")), appends=False)
        self._collected = bytearray()

    @staticmethod
    def open(path: str) -> _Board:
        return _Board(path)

    @staticmethod
    def directory_check(path: str) -> None:
        Path(path.removeprefix(f"{_SCHEME}:")).mkdir(parents=True, exist_ok=True)

    def write(self, data: bytes) -> None:
        self._collected += data
        if len(self._collected) > _ENOUGH:
            self.flush()

    def flush(self) -> None:
        """Write the whole records: each has its length before it, and 16 bytes beside its data."""
        collected = bytes(self._collected)
        start = 0
        while start < len(collected):
            end = start + 16 + int.from_bytes(collected[start : start + 8], "little")
            if end > len(collected):
                break
            self._records.append(collected[start:end])
            start = end
        self._collected = self._collected[start:]

    def close(self) -> None:
        self.flush()
        self._records.close()


class MetricsLog:
    """OUT/metrics.jsonl and OUT/tensorboard.

    Each line is one object with "kind" ("train" or "eval") and "step"; numbers that are not finite
    read null.

    Raises:
        OSError: the files cannot be made; from the constructor only.
    """

    def __init__(self, out: Path, first_step: int) -> None:
        """Open for steps from `first_step` on; what an earlier run wrote of these is dropped."""
        from tensorboardX import SummaryWriter
        from tensorboardX.record_writer import (  # type: ignore[import-untyped]
            REGISTERED_FACTORIES,
            register_writer_factory,
        )

        path = out / "metrics.jsonl"
        _drop_from(path, first_step)
        self._lines = WholeRecords(path, appends=True)
        board = out / "tensorboard"
        if first_step == 1:
            for old in board.glob("events.out.tfevents*"):
                old.unlink()
        purge = first_step if first_step > 1 else None
        if _SCHEME not in REGISTERED_FACTORIES:
            register_writer_factory(_SCHEME, _Board)
        self._board: SummaryWriter = SummaryWriter(f"{_SCHEME}:{board}", purge_step=purge)

    def write(self, kind: str, step: int, **values: float) -> None:
        """Write one line, and one point of each value that is finite."""
        record: dict[str, Any] = {"kind": kind, "step": step}
        record.update({k: v if math.isfinite(v) else None for k, v in values.items()})
        self._lines.append(f"{json.dumps(record)}\n".encode())
        for name, value in values.items():
            if math.isfinite(value):  # tensorboardX prints a warning of its own for others
                self._board.add_scalar(f"{kind}/{name}", value, step)

    def text(self, name: str, text: str, step: int) -> None:
        """Show `text` in TensorBoard."""
        self._board.add_text(name, text, step)

    def close(self) -> None:
        """Flush and close both."""
        self._lines.close()
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
    write_whole(path, "".join(kept))


def write_whole(path: Path, text: str) -> None:
    """Write a file; it has all of `text`, or stays as it was.

    Raises:
        OSError: with the name of the file.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise OSError(error.errno, error.strerror, str(path)) from None
