"""Training steps of zerompi beside other systems and beside a step that communicates nothing."""

from __future__ import annotations

import gc
import importlib.util
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from mpi4py import MPI
from torch import Tensor, nn
from torch.optim import AdamW

import zerompi
from zerompi.bench.gloo import gloo, local_rank
from zerompi.collectives.buffer import give_back_heap
from zerompi.report import Report
from zerompi.traffic import between_nodes
from zerompi.train.model import GPT, VOCABULARY, GPTConfig

FREE = "free"
_WARM_UP = 2  # steps
_LOOK_EVERY = 0.01  # seconds between looks at the memory


@dataclass(frozen=True)
class Workload:
    """A GPT, and what each rank trains it on in a step.

    Attributes:
        layers, width, heads: of the GPT.
        context: bytes of a sequence.
        batch: sequences of each rank.
        steps: that are timed together.
        fused: whether all systems step with torch's fused kernel of AdamW.
    """

    layers: int
    width: int
    heads: int
    context: int
    batch: int
    steps: int
    fused: bool = False

    def make_model(self) -> GPT:
        """The same on every rank."""
        torch.manual_seed(1234)
        return GPT(GPTConfig(self.layers, self.width, self.heads))

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """Of AdamW, which is every system's optimizer."""
        return {"lr": 3e-4, "fused": self.fused or None}

    def make_optimizer(self, model: nn.Module) -> AdamW:
        """Torch's own, over all parameters of `model`."""
        return AdamW(model.parameters(), **self.hyperparameters)

    def make_batch(self, rank: int) -> tuple[Tensor, Tensor]:
        """Tokens and targets of a rank, (batch, context) int64."""
        generator = torch.Generator().manual_seed(rank)
        size = (self.batch, self.context + 1)
        tokens = torch.randint(0, VOCABULARY, size, generator=generator)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


@dataclass(frozen=True)
class Trained:
    """What one system did.

    Attributes:
        system: its name.
        seconds: of a step, the slowest rank's; the median of the repetitions.
        ratio: the median over repetitions of the communication-free step's time by this one's.
        processor: seconds of all cores together that the ranks have kept busy in a step; the median.
        peak: by how much the memory of all ranks has grown at the peak of a step, in bytes; shared
            pages count once (PSS).
        held: the same after a step, when what is free has been returned to the system.
        reported: what zerompi's report says of `held`; None for others.
        sent: bytes that a node sends to others in a step, of the one that sends most, as zerompi counts
            them; None for other systems.
        of_bound: the median over repetitions of the time by that of the bound, which is the longer of the
            communication-free step and of `sent` bytes on the node's link; None without either.
        loss: the mean over ranks in the last step; None for the communication-free step.
    """

    system: str
    seconds: float
    ratio: float
    processor: float
    peak: int
    held: int
    reported: int | None
    loss: float | None
    sent: int | None = None
    of_bound: float | None = None

    @property
    def key(self) -> str:
        """What was measured, to find it in another run's results."""
        return self.system


class Running:
    """A system that is ready to train.

    Args:
        step: trains on a batch; returns the loss.
        report: what the system itself says of this rank, if it does.
    """

    def __init__(
        self, step: Callable[[Tensor, Tensor], Tensor], report: Callable[[], Report] | None = None
    ) -> None:
        self.step = step
        self.report = report


Maker = Callable[[Workload, MPI.Intracomm], AbstractContextManager[Running]]


def _loss(model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x).float().flatten(0, 1), y.flatten())


def _plain_step(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> Callable[[Tensor, Tensor], Tensor]:
    def step(x: Tensor, y: Tensor) -> Tensor:
        loss = _loss(model, x, y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


# -- systems -----------------------------------------------------------------------------------


@contextmanager
def _zerompi(
    stage: int, workload: Workload, comm: MPI.Intracomm, **options: Any
) -> Iterator[Running]:
    model = workload.make_model()
    optimizer = workload.make_optimizer(model)
    with zerompi.partition(model, optimizer, stage=stage, comm=comm, **options) as zero:
        yield Running(_plain_step(model, optimizer), zero.report)


@contextmanager
def _free(workload: Workload, comm: MPI.Intracomm) -> Iterator[Running]:
    """The same compute with every collective left out: each rank steps its part of a model of its own.

    No system with a copy of the weights on each rank is faster, and nothing is learned.
    """
    model = workload.make_model()
    parameters = list(model.parameters())
    total = sum(p.numel() for p in parameters)
    start, stop = total * comm.rank // comm.size, total * (comm.rank + 1) // comm.size
    pieces: list[tuple[nn.Parameter, slice, nn.Parameter]] = []
    offset = 0
    for parameter in parameters:
        low, high = max(start - offset, 0), min(stop - offset, parameter.numel())
        if low < high:
            part = slice(low, high)
            pieces.append((parameter, part, nn.Parameter(parameter.data.flatten()[part])))
        offset += parameter.numel()
    own = [piece for _, _, piece in pieces]
    optimizer = zerompi.AdamW(own, **workload.hyperparameters)  # a partition's steps

    def step(x: Tensor, y: Tensor) -> Tensor:
        loss = _loss(model, x, y)
        loss.backward()
        for parameter, part, piece in pieces:
            assert parameter.grad is not None
            piece.grad = parameter.grad.flatten()[part]
        optimizer.step()
        optimizer.zero_grad()
        model.zero_grad()
        return loss.detach()

    yield Running(step)


@contextmanager
def _ddp(workload: Workload, comm: MPI.Intracomm, *, shards_states: bool) -> Iterator[Running]:
    from torch.distributed.optim import ZeroRedundancyOptimizer
    from torch.nn.parallel import DistributedDataParallel

    model = DistributedDataParallel(workload.make_model(), gradient_as_bucket_view=True)
    optimizer: torch.optim.Optimizer
    if shards_states:
        optimizer = ZeroRedundancyOptimizer(model.parameters(), AdamW, **workload.hyperparameters)
    else:
        optimizer = workload.make_optimizer(model)
    yield Running(_plain_step(model, optimizer))


def make_fsdp2_model(workload: Workload, comm: MPI.Intracomm) -> GPT:
    """The workload's model, its blocks and itself sharded by FSDP2 over gloo's ranks. Collective."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (comm.size,))
    model = workload.make_model()
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


@contextmanager
def _fsdp2(workload: Workload, comm: MPI.Intracomm) -> Iterator[Running]:
    model = make_fsdp2_model(workload, comm)
    yield Running(_plain_step(model, workload.make_optimizer(model)))


@contextmanager
def _deepspeed(stage: int, workload: Workload, comm: MPI.Intracomm) -> Iterator[Running]:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # What its launcher would say.
    names = {"RANK": comm.rank, "WORLD_SIZE": comm.size, "LOCAL_RANK": local_rank(comm)}
    os.environ.update({name: str(value) for name, value in names.items()})
    import deepspeed

    adamw = {"betas": [0.9, 0.999], "eps": 1e-8, "torch_adam": True, **workload.hyperparameters}
    config = {
        "train_micro_batch_size_per_gpu": workload.batch,
        "optimizer": {"type": "AdamW", "params": adamw},
        "zero_optimization": {"stage": stage},
        "gradient_clipping": 0.0,  # else it clips to 1, as nobody else does here
        "steps_per_print": 10**9,
    }
    model = workload.make_model()
    linear = F.linear  # which DeepSpeed replaces for good, for everybody
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=model.parameters(), config=config, dist_init_required=False
    )

    def step(x: Tensor, y: Tensor) -> Tensor:
        loss = _loss(engine, x, y)
        engine.backward(loss)
        engine.step()
        return loss.detach()

    try:
        yield Running(step)
    finally:
        F.linear = linear
        engine.destroy()


SYSTEMS: dict[str, Maker] = {
    FREE: _free,
    "zerompi-1": partial(_zerompi, 1),
    "zerompi-1-ahead": partial(_zerompi, 1, refresh="ahead"),
    "zerompi-2": partial(_zerompi, 2),
    "zerompi-3": partial(_zerompi, 3),
    "zerompi-3-cache": partial(_zerompi, 3, node_cache=True),
    "zerompi-3-node": partial(_zerompi, 3, shard_ranks="node"),
    "ddp": partial(_ddp, shards_states=False),
    "zero-redundancy": partial(_ddp, shards_states=True),
    "fsdp2": _fsdp2,
    "deepspeed-1": partial(_deepspeed, 1),
    "deepspeed-2": partial(_deepspeed, 2),
    "deepspeed-3": partial(_deepspeed, 3),
}


# Ways to hide what goes between nodes, or to send less.
ON_NODES = ("zerompi-1-ahead", "zerompi-3-cache", "zerompi-3-node")


def available(topology: zerompi.Topology) -> list[str]:
    """The systems that are installed, and possible there."""
    names = list(SYSTEMS)
    if importlib.util.find_spec("deepspeed") is None:
        names = [name for name in names if not name.startswith("deepspeed")]
    if len({len(ranks) for ranks in topology.ranks_of_node}) > 1:
        names.remove("zerompi-3-node")
    return names


def worthwhile(topology: zerompi.Topology) -> list[str]:
    """Those of them that differ there: on one node nothing goes between nodes."""
    without = ON_NODES if topology.is_single_node else ()
    return [name for name in available(topology) if name not in without]


def locked_build() -> Path | None:
    """The lock of a build of DeepSpeed's operators: while it is there, DeepSpeed waits.

    A build that was interrupted leaves it behind.
    """
    from torch.utils.cpp_extension import get_default_build_root

    root = os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root()
    return next(Path(root).glob("**/deepspeed_*/lock"), None)


# -- measurement -------------------------------------------------------------------------------


def measure(
    comm: MPI.Intracomm,
    workload: Workload,
    systems: list[str],
    repeats: int,
    link: float | None = None,
) -> list[Trained]:
    """Let the systems take turns, each made anew in each turn. Collective over `comm`.

    Args:
        comm: the ranks.
        workload: what they train.
        systems: names from SYSTEMS; the communication-free step comes first, wanted or not.
        repeats: how many turns.
        link: bytes per second that a node can send to others, where that is known.
    """
    names = [FREE, *(name for name in systems if name != FREE)]
    turns: dict[str, list[_Turn]] = {name: [] for name in names}
    nodes = zerompi.Topology(comm).ranks_of_node
    AdamW([nn.Parameter(torch.zeros(2))])  # torch loads what it needs
    with gloo(comm):  # once: DeepSpeed keeps what it has seen of it
        for _ in range(repeats):
            for name in names:
                turns[name].append(_take_turn(comm, workload, SYSTEMS[name], nodes))
    free = [turn.seconds for turn in turns[FREE]]

    def of_bound(taken: list[_Turn]) -> float | None:
        if link is None or taken[-1].sent is None:
            return None
        on_link = taken[-1].sent / link
        return median(turn.seconds / max(a, on_link) for a, turn in zip(free, taken, strict=True))

    return [
        Trained(
            name,
            median(turn.seconds for turn in taken),
            median(a / turn.seconds for a, turn in zip(free, taken, strict=True)),
            median(turn.processor for turn in taken),
            taken[-1].peak,
            taken[-1].held,
            taken[-1].reported,
            None if name == FREE else taken[-1].loss,
            taken[-1].sent,
            of_bound(taken),
        )
        for name, taken in turns.items()
    ]


@dataclass(frozen=True)
class _Turn:
    seconds: float
    processor: float
    peak: int
    held: int
    reported: int | None
    sent: int | None
    loss: float


def _take_turn(
    comm: MPI.Intracomm, workload: Workload, make: Maker, nodes: Sequence[Sequence[int]]
) -> _Turn:
    x, y = workload.make_batch(comm.rank)
    before = resident_nbytes(comm)
    with make(workload, comm) as running:
        for _ in range(_WARM_UP):
            running.step(x, y)
        comm.Barrier()
        start, busy = time.perf_counter(), time.process_time()
        for _ in range(workload.steps):
            loss = running.step(x, y)
        processor = comm.allreduce(time.process_time() - busy) / workload.steps
        seconds = comm.allreduce(time.perf_counter() - start, MPI.MAX) / workload.steps
        peak = peak_while(comm, partial(running.step, x, y)) - before
        held = resident_nbytes(comm) - before
        reported = sent = None
        if running.report is not None:
            report = running.report()
            reported = comm.allreduce(sum(report.memory.now.values()))
            of_ranks = comm.allgather(between_nodes(report.traffic))
            sent = max(sum(of_ranks[rank] for rank in ranks) for ranks in nodes)
        mean = comm.allreduce(float(loss)) / comm.size
    del running, make
    gc.collect()
    return _Turn(seconds, processor, peak, held, reported, sent, mean)


def resident_nbytes(comm: MPI.Intracomm) -> int:
    """The proportional set sizes of all ranks together: shared pages count once. Collective."""
    gc.collect()
    give_back_heap()
    comm.Barrier()
    return int(comm.allreduce(_own_nbytes()))


def _own_nbytes() -> int:
    with open("/proc/self/smaps_rollup") as lines:
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))


def peak_while(comm: MPI.Intracomm, step: Callable[[], object]) -> int:
    """The sum over ranks of the largest size that each has had during a step. Collective."""
    sizes = [_own_nbytes()]
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(_LOOK_EVERY):
            sizes.append(_own_nbytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    step()
    ended.set()
    watcher.join()
    return int(comm.allreduce(max(sizes)))
