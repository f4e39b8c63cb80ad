"""Checkpoint directories: replaced in one step, found by their step, cleaned of what was left behind."""

from __future__ import annotations

import ctypes
import errno
import logging
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

LATEST_NAME = "latest"
_STEP = re.compile(r"step-([0-9]+)")
_LEFTOVER = re.compile(
    r"\.(?P<name>.+)\.(?P<kind>tmp|old)-(?P<host>.*)-(?P<pid>[0-9]+)-[0-9a-f]{8}", re.DOTALL
)
# A writer on another host cannot be asked; it counts as killed when it has written nothing for so
# long.
_SILENT_SECONDS = 3600.0
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of renameat2(2)

_log = logging.getLogger("zerompi")


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
        self.temporary = _sibling(self.path, "tmp")
        self.temporary.mkdir()

    def commit(self) -> None:
        """Rename to the final path; what was there is removed.

        Where the file system can exchange two directories, there is a checkpoint at the path at
        every moment; elsewhere there is none between two renames, and `remove_leftovers` brings the
        old one back after a crash just then.

        Raises:
            OSError: what was at the path is there still.
        """
        sync_directory(self.temporary)
        check_replaceable(self.path)
        if not self.path.exists():
            self.temporary.rename(self.path)
            sync_directory(self.path.parent)
        elif exchange(self.temporary, self.path):
            sync_directory(self.path.parent)
            self.discard()
        else:
            self._replace_by_two_renames()

    def _replace_by_two_renames(self) -> None:
        aside = _sibling(self.path, "old")
        self.path.rename(aside)
        try:
            self.temporary.rename(self.path)
        except OSError:
            aside.rename(self.path)
            raise
        sync_directory(self.path.parent)
        shutil.rmtree(aside, ignore_errors=True)

    def discard(self) -> None:
        """Remove the temporary directory."""
        shutil.rmtree(self.temporary, ignore_errors=True)


def _sibling(path: Path, kind: str) -> Path:
    mark = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
    return path.with_name(f".{path.name}.{kind}-{mark}")


def exchange(first: Path, second: Path) -> bool:
    """Exchange two directories in one step; False where the system or the file system cannot.

    Raises:
        OSError: it can, but not these two.
    """
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    names = (os.fsencode(first), os.fsencode(second))
    if rename(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code), str(second))


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
    return max(_complete(Path(directory)), default=(0, None))[1]


def _complete(directory: Path) -> list[tuple[int, Path]]:
    """The steps and paths of the complete checkpoints `step-N`."""
    found = []
    with suppress(FileNotFoundError):
        for path in directory.iterdir():
            match = _STEP.fullmatch(path.name)
            if match and (path / STATE_NAME).is_file():
                found.append((int(match[1]), path))
    return found


def tidy_series(path: Path, keep: int) -> None:
    """After the checkpoint `step-N` at `path`: let `latest` point to it, then remove older ones.

    `keep` newest ones stay, the one at `path` among them and those of larger steps not counted; 0 keeps
    all. Nothing is done for a path of another name.
    """
    match = _STEP.fullmatch(path.name)
    if match is None:
        return
    _point_latest(path)
    if keep:
        older = [(step, other) for step, other in _complete(path.parent) if step < int(match[1])]
        for _, other in sorted(older, reverse=True)[keep - 1 :]:
            _remove(other)


def _point_latest(path: Path) -> None:
    link, new = path.with_name(LATEST_NAME), _sibling(path.with_name(LATEST_NAME), "tmp")
    if link.exists() and not link.is_symlink():
        return  # somebody's own
    try:
        new.symlink_to(path.name, target_is_directory=True)
        new.replace(link)
    except OSError as error:  # the checkpoint is complete without it
        _log.warning("%s: not moved to %s: %s", link, path.name, error.strerror)
    sync_directory(path.parent)


def _remove(path: Path) -> None:
    """Remove a checkpoint; a crash on the way leaves something that is recognised as a leftover."""
    with suppress(OSError):
        hidden = _sibling(path, "tmp")
        path.rename(hidden)
        shutil.rmtree(hidden, ignore_errors=True)


def remove_leftovers(directory: str | os.PathLike[str]) -> None:
    """Remove from `directory` what killed writers left. Not collective: one rank calls it.

    A checkpoint that a writer had moved aside, but not yet replaced, is moved back. What a living
    writer works on stays: one of this host is asked for; one of another host counts as living for an hour
    after its last write.
    """
    with suppress(FileNotFoundError):
        for path in list(Path(directory).iterdir()):
            match = _LEFTOVER.fullmatch(path.name)
            if match is None or _is_written(path, match):
                continue
            if path.is_symlink():  # a `latest` that was to be
                path.unlink(missing_ok=True)
                continue
            if not path.is_dir():
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
    newest = path.lstat().st_mtime
    if path.is_dir() and not path.is_symlink():
        for entry in path.iterdir():
            with suppress(FileNotFoundError):
                newest = max(newest, entry.stat().st_mtime)
    return time.time() - newest < _SILENT_SECONDS
