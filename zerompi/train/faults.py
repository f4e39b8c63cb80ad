"""Steps whose loss or gradient is NaN or infinite: at which rank that began.

The reduced gradient does not tell. What each rank knows for itself is asked for after the fact, so
that steps without a fault pay nothing.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from mpi4py import MPI
from torch import Tensor, nn

from zerompi.activity import listed
from zerompi.gradient_norms import is_finite
from zerompi.watchdog import waiting

_log = logging.getLogger("zerompi")


class RandomState:
    """The state of torch's generators, on the host and on a device of torch.cuda."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._host = torch.get_rng_state()
        self._own = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def install(self) -> None:
        """Let the generators go on from here."""
        torch.set_rng_state(self._host)
        if self._own is not None:
            torch.cuda.set_rng_state(self._own, self._device)


def start_of_backward(loss: Tensor) -> Tensor:
    """1, or NaN if the loss is not finite: its gradient may be finite all the same."""
    return torch.where(loss.detach().isfinite(), torch.ones_like(loss), math.nan)


def describe_losses(losses: Sequence[float]) -> str | None:
    """Which ranks' losses are not finite; None if all are."""
    ranks = [rank for rank, loss in enumerate(losses) if not math.isfinite(loss)]
    if not ranks:
        return None
    values = ", ".join(sorted({str(losses[rank]) for rank in ranks}))
    if len(ranks) == 1:
        return f"the loss of rank {ranks[0]} is {values}"
    return f"the losses of ranks {listed(ranks)} are {values}"


def find_cause(
    model: nn.Module,
    comm: MPI.Intracomm,
    losses: Sequence[float],
    repeat: Callable[[], object],
) -> str:
    """At which rank, and where, a step went wrong whose gradients are not finite. Collective.

    Args:
        model: partitioned; its gradients have been zeroed.
        comm: the ranks of the partition.
        losses: of all ranks in the step.
        repeat: runs the passes of the step once more, if the losses do not tell.
    """
    text = describe_losses(losses)
    if text is not None:
        return text
    faulty: list[str] = []  # in the order of the backward pass

    def look(name: str, gradient: Tensor) -> None:
        if not is_finite(gradient):
            faulty.append(name)

    handles = [
        parameter.register_hook(lambda gradient, name=name: look(name, gradient))
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    ]
    try:
        repeat()
    finally:
        for handle in handles:
            handle.remove()
    with waiting("which ranks have gradients that are not finite"):
        firsts = comm.allgather(faulty[0] if faulty else None)
    found = [f"rank {rank} ({name})" for rank, name in enumerate(firsts) if name is not None]
    if not found:
        return "the losses are finite, and each rank's gradients are when the passes are repeated"
    return f"the losses are finite; the backward pass goes wrong on {', '.join(found[:8])}"


class SkippedSteps(logging.Filter):
    """Keeps what the optimizer logs of a step that it skips, until it is known where that went wrong.

    Rank 0 alone has something to keep.
    """

    def __init__(self) -> None:
        super().__init__()
        self._kept: list[str] = []

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is of something else."""
        if record.module != "optimizer":
            return True
        self._kept.append(record.getMessage())
        return False

    @contextmanager
    def kept(self) -> Iterator[None]:
        """While the context lasts, what is logged passes through here."""
        _log.addFilter(self)
        try:
            yield
        finally:
            _log.removeFilter(self)

    @property
    def has_any(self) -> bool:
        """Whether a step was skipped since `tell`."""
        return bool(self._kept)

    def tell(self, step: int, cause: str) -> None:
        """Log what was kept, with the step and where it went wrong."""
        for text in self._kept:
            _log.warning("step %d: %s: %s", step, cause, text)
        self._kept.clear()
