"""Results of benchmarks as pictures; needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from zerompi.bench.checkpoints import Stored
from zerompi.bench.collectives import Result
from zerompi.bench.training import Trained

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_collectives(results: Sequence[Result], title: str, path: Path) -> None:
    """Time by size: one panel for each collective and dtype, one line for each way."""
    panels = list(dict.fromkeys((result.collective, result.dtype) for result in results))
    figure = _figure(5 * len(panels), 4)
    for number, panel in enumerate(panels, start=1):
        axes = figure.add_subplot(1, len(panels), number)
        shown = [result for result in results if (result.collective, result.dtype) == panel]
        for way in dict.fromkeys(result.way for result in shown):
            line = sorted((r.nbytes, r.seconds) for r in shown if r.way == way)
            axes.plot([size for size, _ in line], [time for _, time in line], "o-", label=way)
        axes.set(xscale="log", yscale="log", xlabel="bytes of the buffer", ylabel="seconds")
        axes.set_title(" ".join(panel))
        axes.legend()
    _save(figure, title, path)


def plot_training(results: Sequence[Trained], title: str, path: Path) -> None:
    """Steps per second of each system, with the communication-free step as a line, and memory."""
    figure = _figure(10, 1.5 + 0.4 * len(results))
    names = [result.system for result in results][::-1]
    speed = figure.add_subplot(1, 2, 1)
    speed.barh(names, [1 / result.seconds for result in results][::-1])
    speed.axvline(1 / results[0].seconds, color="black", linestyle=":")
    speed.set_xlabel("steps per second")
    memory = figure.add_subplot(1, 2, 2)
    memory.barh(names, [result.peak / 1e6 for result in results][::-1], color="tab:orange")
    memory.set_xlabel("memory of all ranks at the peak of a step, MB")
    _save(figure, title, path)


def plot_checkpoints(results: Sequence[Stored], title: str, path: Path) -> None:
    """Seconds of a save, of the pause in it, and of a load, for each system."""
    figure = _figure(12, 1.5 + 0.4 * len(results))
    names = [result.system for result in results][::-1]
    panels = {
        "seconds until it is on the disk": [result.seconds for result in results],
        "seconds that training pauses": [result.pause for result in results],
        "seconds of a load": [result.load or 0 for result in results],
    }
    for number, (label, values) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(1, 3, number)
        axes.barh(names, values[::-1])
        axes.set_xlabel(label)
        axes.tick_params(labelleft=number == 1)
    _save(figure, title, path)


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Figure, title: str, path: Path) -> None:
    figure.suptitle(title)
    figure.savefig(path, dpi=150)
