"""What the system can be told about a file that is about to be written, where it can: Linux."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable
from functools import cache

_WRITE = 2  # SYNC_FILE_RANGE_WRITE of sync_file_range(2)
_NOT_HERE = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


@cache
def _function(name: str, *kinds: type) -> Callable[..., int] | None:
    found = getattr(ctypes.CDLL(None, use_errno=True), name, None)
    if found is not None:
        found.argtypes = kinds
    return found


def allocate(descriptor: int, nbytes: int) -> None:
    """Reserve the room of an empty file, in one piece if there is one, before several ranks write to it.

    Not by posix_fallocate, which writes zeros where the file system cannot.

    Raises:
        OSError: there is no room.
    """
    fallocate = _function("fallocate", ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    if not nbytes or fallocate is None or fallocate(descriptor, 0, 0, nbytes) == 0:
        return
    code = ctypes.get_errno()
    if code not in _NOT_HERE:
        raise OSError(code, os.strerror(code))


def start_writing(descriptor: int, offset: int, nbytes: int) -> None:
    """Let the disk begin with these bytes now; fsync, which waits for them, tells of errors."""
    sync = _function("sync_file_range", ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    if nbytes and sync is not None:
        sync(descriptor, offset, nbytes, _WRITE)
