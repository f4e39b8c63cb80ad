"""Memory of this process, and what running out of it looks like."""

from __future__ import annotations

import errno
import resource
import sys

import torch

# What torch, the C++ library and the threads' start say; none has a class of its own.
_PHRASES = (
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "out of memory",
    "std::bad_alloc",
    "can't start new thread",
)


def peak_rss() -> int:
    """The most resident memory that this process has had, bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that there was no memory left."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(
        phrase in str(error).lower() for phrase in _PHRASES
    )
