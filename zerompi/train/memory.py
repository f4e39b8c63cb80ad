"""Memory of this process."""

from __future__ import annotations

import resource
import sys


def peak_rss() -> int:
    """The most resident memory that this process has had, bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
