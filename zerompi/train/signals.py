"""Requests to stop that arrive as signals, as batch systems send before the time is over."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType


class StopRequest:
    """While the context lasts, SIGTERM and SIGUSR1 are remembered instead of ending the process.

    Attributes:
        signal: number of the signal that arrived on this rank; 0 for none.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGTERM, signal.SIGUSR1):
            self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
