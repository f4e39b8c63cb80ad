"""What a partition measures: bytes of memory by category, seconds by phase, and the theory beside them."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field

import torch

from zerompi.placement import Placement, Stage

CATEGORIES = ("parameters", "gradients", "optimizer_states", "buffers")


def storage_nbytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the distinct storages behind `tensors`, each counted once and as a whole."""
    storages = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


class MemoryLedger:
    """Bytes by category now and at peak.

    parameters: the persistent copy in the parameter dtype. gradients: reduced gradients, and at
    stages 0 and 1 the full ones. optimizer_states: main weights that are a copy of their own, and
    the optimizer's state. buffers: what lives for a moment (gathered parameters at stage 3, buckets
    at stages 2 and 3, casts) and the model's own buffers.
    """

    def __init__(self) -> None:
        self.now: dict[str, int] = dict.fromkeys(CATEGORIES, 0)
        self.peak: dict[str, int] = dict.fromkeys(CATEGORIES, 0)
        self._lock = threading.Lock()

    def add(self, category: str, nbytes: int) -> None:
        """Count `nbytes` more (fewer if negative) in `category`; any thread may."""
        with self._lock:
            self._set(category, self.now[category] + nbytes)

    def set(self, category: str, nbytes: int) -> None:
        """Set `category` to what was just measured."""
        with self._lock:
            self._set(category, nbytes)

    def _set(self, category: str, nbytes: int) -> None:
        self.now[category] = nbytes
        self.peak[category] = max(self.peak[category], nbytes)

    @contextmanager
    def borrowed(self, nbytes: int) -> Iterator[None]:
        """Count a temporary of `nbytes` among the buffers while the context lasts."""
        self.add("buffers", nbytes)
        try:
            yield
        finally:
            self.add("buffers", -nbytes)


class PhaseTimes:
    """Seconds by phase since the last `reset`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Add the time spent in the context to phase `name`."""
        return _Phase(self, name)

    def reset(self) -> dict[str, float]:
        """Start anew; return what was counted."""
        seconds, self.seconds = self.seconds, {}
        return seconds


class _Phase:
    """See `PhaseTimes.phase`; a class, since each unit of each step enters some."""

    def __init__(self, times: PhaseTimes, name: str) -> None:
        self._times = times
        self._name = name

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *exception: object) -> None:
        seconds = self._times.seconds
        seconds[self._name] = seconds.get(self._name, 0.0) + time.perf_counter() - self._start


@dataclass(frozen=True)
class ElementBytes:
    """Bytes per element of each kind of state."""

    parameter: int
    gradient: int
    optimizer_state: int


def zero_formula(
    numel: int,
    num_shards: int,
    stage: Stage,
    per_element: ElementBytes,
    ranks_per_copy: int = 1,
) -> dict[str, float]:
    """Bytes per rank that ZeRO needs for `numel` parameters, by category.

    arXiv:1910.02054, section 3.1 and figure 1: with 2-byte parameters and gradients and K = 12
    bytes of optimizer state, 16 Psi at stage 0, 4 Psi + 12 Psi / N at stage 1, 2 Psi + 14 Psi / N
    at stage 2 and 16 Psi / N at stage 3. Where `ranks_per_copy` ranks of a node have one copy of
    replicated parameters together, each answers for its share of it.
    """

    def share(placement: Placement) -> float:
        return numel / num_shards if placement is Placement.SHARD else numel

    return {
        "parameters": per_element.parameter
        * (
            share(stage.parameter) if stage.parameter is Placement.SHARD else numel / ranks_per_copy
        ),
        "gradients": per_element.gradient * share(stage.gradient),
        "optimizer_states": per_element.optimizer_state * share(stage.optimizer_state),
    }


@dataclass(frozen=True)
class MemoryReport:
    """Bytes on this rank by category (parameters, gradients, optimizer_states, buffers)."""

    now: Mapping[str, int]
    peak: Mapping[str, int]
    formula: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """What `Zero.report()` returns.

    Attributes:
        traffic: bytes that this rank sent in the last step, as {label: {level: bytes}} with the levels
            "intra_node" and "inter_node", and "inter_group" where the topology has groups of nodes.
        memory: bytes by category, now and at peak, and the formula of the ZeRO paper.
        time: seconds by phase in the last step.
        spared: bytes of parameters, as messages have them, that were not gathered again in the last step at
            stage 3, since they had stayed from forward to backward: 0 but with `reshard_last=False`.
    """

    traffic: Mapping[str, Mapping[str, int]]
    memory: MemoryReport
    time: Mapping[str, float]
    spared: int = 0
