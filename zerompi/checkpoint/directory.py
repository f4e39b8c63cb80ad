"""Checkpoint directories: replaced in one step, found by their step, cleaned of what was left behind."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import socket
import time
from contextlib import suppress
from pathlib import Path

from zerompi.checkpoint.state_file import STATE_NAME
from zerompi.errors import CheckpointError

_STEP = re.compile(r"step-([0-9]+)")
_LEFTOVER = re.compile(
    r"\.(?P<name>.+)\.(?P<kind>tmp|old)-(?P<host>.*)-(?P<pid>[0-9]+)-[0-9a-f]{8}", re.DOTALL
)
# A writer on another host cannot be asked; it counts as killed when it has written nothing for so
# long.
_SILENT_SECONDS = 3600.0


class Replacement:
    """A temporary directory that takes the place of the checkpoint at `path`, wholly or not at all.

    Attributes:
        path: the final path, symbolic links resolved.
        temporary: the hidden sibling to write into.
    """

    def __init__(self, path: Path) -> None:
        """Create the temporary directory, and the parent directories where they are missing.

        Raises:
            CheckpointError: at `path` is something that is no checkpoint.
            OSError: the directory cannot be created.
        """
        self.path = Path(os.path.realpath(path))
        check_replaceable(self.path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        mark = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        self.temporary = self.path.with_name(f".{self.path.name}.tmp-{mark}")
        self._aside = self.path.with_name(f".{self.path.name}.old-{mark}")
        self.temporary.mkdir()

    def commit(self) -> None:
        """Rename to the final path; what was there is removed.

        Raises:
            OSError: what was at the path is there still.
        """
        sync_directory(self.temporary)
        check_replaceable(self.path)
        if self.path.exists():
            self.path.rename(self._aside)
        try:
            self.temporary.rename(self.path)
        except OSError:
            if self._aside.exists():
                self._aside.rename(self.path)
            raise
        sync_directory(self.path.parent)
        shutil.rmtree(self._aside, ignore_errors=True)

    def discard(self) -> None:
        """Remove the temporary directory."""
        shutil.rmtree(self.temporary, ignore_errors=True)


def check_replaceable(path: Path) -> None:
    """Refuse to replace anything but a checkpoint or an empty directory.

    Raises:
        CheckpointError: a file, or a directory of other things, is at `path`.
    """
    if path.is_dir():
        if not (path / STATE_NAME).exists() and any(path.iterdir()):
            raise CheckpointError(
                f"{path}: expected a checkpoint or nothing to replace, got a directory with other "
                "contents"
            )
    elif path.exists():
        raise CheckpointError(f"{path}: expected a directory or nothing, got a file")


def sync_directory(path: Path) -> None:
    """Bring the directory's entries to the disk, where the file system can."""
    # Some network file systems refuse this, and a completed rename cannot be taken back.
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def find_latest(directory: str | os.PathLike[str]) -> Path | None:
    """The complete checkpoint `step-N` in `directory` with the largest N; None if there is none."""
    steps = []
    with suppress(FileNotFoundError):
        for path in Path(directory).iterdir():
            match = _STEP.fullmatch(path.name)
            if match and (path / STATE_NAME).is_file():
                steps.append((int(match[1]), path))
    return max(steps)[1] if steps else None


def remove_leftovers(directory: str | os.PathLike[str]) -> None:
    """Remove from `directory` what killed writers left. Not collective: one rank calls it.

    A checkpoint that a writer had moved aside, but not yet replaced, is moved back. What a living
    writer works on stays: one of this host is asked for; one of another host counts as living for an hour
    after its last write.
    """
    with suppress(FileNotFoundError):
        for path in list(Path(directory).iterdir()):
            match = _LEFTOVER.fullmatch(path.name)
            if match is None or not path.is_dir() or _is_written(path, match):
                continue
            final = path.with_name(match["name"])
            if match["kind"] == "old" and not final.exists():
                path.rename(final)
            else:
                shutil.rmtree(path, ignore_errors=True)


def _is_written(path: Path, match: re.Match[str]) -> bool:
    if match["host"] == socket.gethostname():
        try:
            os.kill(int(match["pid"]), 0)
        except (ProcessLookupError, OverflowError):
            return False
        except PermissionError:
            return True
        return True
    newest = 0.0
    for entry in (path, *path.iterdir()):
        with suppress(FileNotFoundError):
            newest = max(newest, entry.stat().st_mtime)
    return time.time() - newest < _SILENT_SECONDS
