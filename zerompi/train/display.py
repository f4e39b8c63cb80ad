"""What a run shows while it trains: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple, Protocol

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

_LAUNCHERS = ("mpiexec", "mpirun", "prterun", "prun", "orterun", "srun", "aprun", "hydra")


class StepMetrics(NamedTuple):
    """One step, seen over all ranks."""

    step: int
    loss: float
    lr: float
    grad_norm: float
    tokens_per_second: float
    peak_rss: int

    def line(self, num_steps: int) -> str:
        """As one line of text."""
        return f"step {self.step:>{len(str(num_steps))}}/{num_steps}  {self.numbers()}"

    def numbers(self) -> str:
        """Loss, speed and memory."""
        return (
            f"loss {self.loss:.4f}  {self.tokens_per_second:,.0f} tokens/s  "
            f"memory {self.peak_rss / 2**20:,.0f} MiB"
        )


class Display(Protocol):
    """Where progress goes."""

    def step(self, metrics: StepMetrics) -> None:
        """Show one step."""

    def say(self, text: str) -> None:
        """Show one line that stays."""

    def close(self) -> None:
        """Leave the terminal as it was."""


class SilentDisplay:
    """Of ranks that show nothing, and for `--progress none`."""

    def step(self, metrics: StepMetrics) -> None:
        """Show nothing."""

    def say(self, text: str) -> None:
        """Show nothing."""

    def close(self) -> None:
        """Nothing to leave."""


class LineDisplay:
    """About twenty lines in all."""

    def __init__(self, num_steps: int) -> None:
        self._num_steps = num_steps
        self._every = max(1, num_steps // 20)
        self._first = True

    def step(self, metrics: StepMetrics) -> None:
        """Print every so many steps, and the first and last."""
        if self._first or metrics.step % self._every == 0 or metrics.step == self._num_steps:
            print(metrics.line(self._num_steps), flush=True)
        self._first = False

    def say(self, text: str) -> None:
        """Print it."""
        print(text, flush=True)

    def close(self) -> None:
        """Nothing to leave."""


class BarDisplay:
    """A bar that stays at the bottom."""

    def __init__(self, num_steps: int, done: int) -> None:
        self._console = make_console(force_terminal=True)
        self._bar = Progress(
            TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
            BarColumn(bar_width=None),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
            console=self._console,
            expand=True,
        )
        self._task = self._bar.add_task("", total=num_steps, completed=done)
        self._bar.start()

    def step(self, metrics: StepMetrics) -> None:
        """Move the bar."""
        self._bar.update(self._task, completed=metrics.step, description=metrics.numbers())

    def say(self, text: str) -> None:
        """Print above the bar."""
        self._console.print(escape(text), highlight=False)

    def close(self) -> None:
        """Stop drawing."""
        self._bar.stop()


def make_display(progress: str, num_steps: int, done: int, *, shows: bool) -> Display:
    """The display that `--progress` asks for; one that shows nothing on other ranks than 0."""
    if not shows or progress == "none":
        return SilentDisplay()
    if progress == "bar" or (progress == "auto" and _terminal() is not None):
        return BarDisplay(num_steps, done)
    return LineDisplay(num_steps)


def make_console(*, force_terminal: bool = False) -> Console:
    """A console for standard output, with colours only where that ends in a terminal."""
    terminal = _terminal()
    width = None if terminal is None else _columns(terminal)
    return Console(force_terminal=force_terminal or terminal is not None, width=width)


def _terminal() -> Path | None:
    """The terminal that standard output ends in; None if it does not end in one.

    A launcher gives its ranks a pipe or a terminal of their own, whatever its own output is; so
    that is looked up where the system shows it (Linux) and the launcher runs on this node.
    """
    pid = os.getppid()
    outermost = None
    while pid > 1:
        try:
            name = Path(f"/proc/{pid}/comm").read_text().strip()
            parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError, IndexError):
            break
        if name.startswith(_LAUNCHERS):
            outermost = Path(f"/proc/{pid}/fd/1")
        pid = parent
    try:
        target = Path(os.ttyname(1)) if outermost is None else outermost.resolve()
    except OSError:
        return None
    return target if str(target).startswith(("/dev/pts/", "/dev/tty")) else None


def _columns(terminal: Path) -> int | None:
    try:
        descriptor = os.open(terminal, os.O_RDONLY | os.O_NOCTTY)
    except OSError:
        return None
    try:
        return os.get_terminal_size(descriptor).columns or None
    except OSError:
        return None
    finally:
        os.close(descriptor)
