"""The end of a run: bytes moved against the theory, memory against the formula, time, result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from math import isfinite
from typing import Any

from rich.console import Console
from rich.table import Table

from zerompi.accounting import MessageBytes
from zerompi.report import Report
from zerompi.train.evaluate import Evaluation
from zerompi.train.job import Job
from zerompi.train.memory import peak_rss

_FORWARD_BACKWARD = "forward and backward"


@dataclass
class Meter:
    """Sums over the steps of this process, and one step's traffic without evaluations in it.

    Attributes:
        seconds: of all steps.
        steps: how many there were.
        timed_steps: those of them that no evaluation preceded.
        phases: seconds of the timed steps by phase.
        traffic: of the last timed step.
        spared: bytes of gathers that this step did not need.
    """

    seconds: float = 0.0
    steps: int = 0
    timed_steps: int = 0
    phases: dict[str, float] = field(default_factory=dict)
    traffic: Mapping[str, Mapping[str, int]] | None = None
    spared: int = 0

    def add(self, report: Report, seconds: float, *, evaluated_before: bool) -> None:
        """Count one step; `evaluated_before`: forward passes of an evaluation preceded it."""
        self.steps += 1
        self.seconds += seconds
        # The phases of an evaluation before the step are counted with the step's, its time is not.
        if not evaluated_before:
            self.traffic, self.spared = report.traffic, report.spared
            self.timed_steps += 1
            rest = seconds - sum(report.time.values())
            for name, part in {_FORWARD_BACKWARD: rest, **report.time}.items():
                self.phases[name] = self.phases.get(name, 0.0) + part

    @property
    def phase_means(self) -> dict[str, float]:
        """Seconds of one step by phase; empty if no step could be timed."""
        return {name: seconds / self.timed_steps for name, seconds in self.phases.items()}


@dataclass(frozen=True)
class Summary:
    """What OUT/summary.json holds.

    Bytes and seconds are of one step and means over the ranks; memory is the largest of any rank.
    """

    text: dict[str, Any]
    run: dict[str, Any]
    result: dict[str, Any]
    traffic: dict[str, dict[str, float]]
    traffic_theory: dict[str, float]
    memory: dict[str, dict[str, float]]
    peak_rss: int
    seconds: dict[str, float]
    sample: str

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def traffic_theory(
    numel: int,
    *,
    stage: int,
    num_shards: int,
    num_replicas: int,
    num_copies: int,
    param_nbytes: int,
    passes: int,
    num_keepers: int = 0,
    quantized: MessageBytes | None = None,
    spared: int = 0,
) -> dict[str, float]:
    """Bytes that a rank sends per step, the mean over ranks, by label.

    Rajbhandari et al., arXiv:1910.02054, section 7: 2 Psi elements at stages 0 to 2, 3 Psi at stage
    3, times (N - 1) / N; gradients travel as float32. At stage 3 the parameters travel twice in
    each of the `passes` of a step, but for the `spared` bytes of those that stayed from forward to
    backward. Ranks that share a node's copy get their parameters together:
    each shard goes to the other ones of `num_copies` only. With `node_cache` (hpZ, arXiv:2306.10209) they
    travel once in a step; the `num_keepers` ranks of a node that keep them in parts then gather them among
    themselves (0: nobody does, or they have one copy). Between replicas (MiCS, arXiv:2205.00119)
    the shard's gradients are all-reduced. With `quantized` messages the parameters, and what is sent of
    gradients, have that many bytes; ranks that share memory read each other's gradients as they are.
    """
    gradient_nbytes = 4
    size = num_shards * num_replicas
    if stage == 0:
        return {"all_reduce": 2 * numel * gradient_nbytes * (size - 1) / size}
    parameters, gradients = param_nbytes * numel, gradient_nbytes * numel
    sent = gradients
    if quantized is not None:
        parameters, sent = quantized
    reduced = sent * (num_copies - 1) + gradients * (num_shards - num_copies)
    bytes_of = {"reduce_scatter": reduced / num_shards}
    gathered = parameters * (num_copies - 1) / num_shards
    if stage == 3 and gathered:
        again = (2 * passes - 1) * parameters - spared
        bytes_of["all_gather"] = gathered + again * (num_copies - 1) / num_shards
        if num_keepers:
            again = (2 * passes - 1) * param_nbytes * numel - spared
            own = again / num_keepers if num_copies == num_shards else 0
            bytes_of["all_gather"] = gathered + own * (num_keepers - 1)
    elif gathered:
        bytes_of["refresh"] = gathered
    if num_replicas > 1:
        shard = numel / num_shards
        bytes_of["all_reduce"] = 2 * shard * gradient_nbytes * (num_replicas - 1) / num_replicas
    return bytes_of


def summarise(
    job: Job, meter: Meter, loss: float | None, evaluation: Evaluation, sample: str
) -> Summary:
    """Put the figures of all ranks together. Collective."""
    comm, config, corpus = job.comm, job.config, job.corpus
    memory = job.zero.report().memory
    everyone = comm.allgather((dict(memory.peak), dict(memory.formula), peak_rss()))
    categories = {
        name: {
            "peak": max(peak[name] for peak, _, _ in everyone),
            "formula": max(formula.get(name, 0.0) for _, formula, _ in everyone),
        }
        for name in memory.peak
    }
    phases = comm.allgather(meter.phase_means)
    counted = comm.allgather(meter.traffic or {})
    shards = _num_shards(job)
    itemsize = 4 if config.dtype == "float32" else 2
    rate = config.tokens_per_step * meter.steps / meter.seconds if meter.seconds else 0.0
    return Summary(
        text={
            "name": corpus.name,
            "bytes": corpus.num_bytes,
            "held_out_bytes": corpus.held_out_bytes,
            "tokens": corpus.codec.name,
            "unigram_bits_per_byte": corpus.unigram_entropy,
        },
        run={
            "parameters": job.numel,
            "stage": config.stage,
            "dtype": config.dtype,
            "ranks": comm.size,
            "nodes": job.topology.num_nodes,
            "steps": job.num_steps,
            "seconds": meter.seconds,
            "tokens_per_second": rate,
        },
        result={
            "train_loss": _finite(loss),
            "validation_loss": _finite(evaluation.loss),
            "validation_bits_per_byte": _finite(evaluation.bits_per_byte),
            "validation_windows": evaluation.num_windows,
        },
        traffic=_mean_traffic(counted),
        traffic_theory=traffic_theory(
            job.numel,
            stage=config.stage,
            num_shards=shards,
            num_replicas=comm.size // shards,
            num_copies=job.zero.num_copies,
            param_nbytes=itemsize,
            passes=config.accumulate,
            num_keepers=len(job.topology.ranks_of_node[0]) if config.node_cache else 0,
            quantized=job.zero.message_nbytes if config.is_quantized else None,
            spared=meter.spared,
        ),
        memory=categories,
        peak_rss=max(rss for _, _, rss in everyone),
        seconds={
            name: sum(part.get(name, 0.0) for part in phases) / comm.size for name in meter.phases
        },
        sample=sample,
    )


def _finite(value: float | None) -> float | None:
    """`value`, or None (null in JSON) for what is not finite."""
    return value if value is not None and isfinite(value) else None


def _shown(value: float | None, digits: int) -> str:
    return "no" if value is None else f"{value:.{digits}f}"


def _num_shards(job: Job) -> int:
    shard_ranks = job.config.shard_ranks
    if shard_ranks == "world":
        return job.comm.size
    return len(job.topology.ranks_of_node[0]) if shard_ranks == "node" else int(shard_ranks)


def _mean_traffic(
    counted: list[Mapping[str, Mapping[str, int]]],
) -> dict[str, dict[str, float]]:
    mean: dict[str, dict[str, float]] = {}
    for traffic in counted:
        for label, levels in traffic.items():
            for level, nbytes in levels.items():
                row = mean.setdefault(label, {})
                row[level] = row.get(level, 0.0) + nbytes / len(counted)
    return mean


# -- tables ------------------------------------------------------------------------------------


def print_summary(summary: Summary, console: Console) -> None:
    """Show the tables."""
    run, text, result = summary.run, summary.text, summary.result
    table = Table(title="Result", show_header=False)
    table.add_row("text", f"{text['name']}, {text['bytes']:,} bytes as {text['tokens']}")
    table.add_row(
        "held out",
        f"the last {text['held_out_bytes']:,} bytes, {result['validation_windows']} windows",
    )
    table.add_row(
        "model", f"{run['parameters']:,} parameters, {run['dtype']}, stage {run['stage']}"
    )
    nodes = f"{run['nodes']} node{'s' * (run['nodes'] > 1)}"
    table.add_row("job", f"{run['ranks']} ranks, {nodes}, {run['steps']} steps")
    table.add_row("speed", f"{run['tokens_per_second']:,.0f} tokens/s, {run['seconds']:.1f} s")
    table.add_row("training loss", f"{_shown(result['train_loss'], 4)} nats per token")
    table.add_row("validation loss", f"{_shown(result['validation_loss'], 4)} nats per token")
    table.add_row("validation", f"{_shown(result['validation_bits_per_byte'], 3)} bits per byte")
    table.add_row("unigram entropy", f"{text['unigram_bits_per_byte']:.3f} bits per byte")
    console.print(table)
    console.print(_traffic_table(summary))
    console.print(_memory_table(summary))
    table = Table("phase", "seconds", title="Time of a step, mean over ranks")
    for name, seconds in summary.seconds.items():
        table.add_row(name, f"{seconds:.4f}")
    console.print(table)


def _traffic_table(summary: Summary) -> Table:
    title = "Bytes that a rank sends per step, mean over ranks"
    table = Table("collective", "inside nodes", "between nodes", "sum", "theory", title=title)
    labels = list(dict.fromkeys([*summary.traffic_theory, *summary.traffic]))
    sums = [0.0, 0.0, 0.0]
    for label in labels:
        levels = summary.traffic.get(label, {})
        inside, between = levels.get("intra_node", 0.0), levels.get("inter_node", 0.0)
        theory = summary.traffic_theory.get(label, 0.0)
        sums = [sums[0] + inside, sums[1] + between, sums[2] + theory]
        row = (inside, between, inside + between, theory)
        # What no theory speaks of: the headers with which ranks agree before data moves.
        table.add_row(label, *(f"{n:,.0f}" for n in row[: 4 if theory else 3]))
    total = (sums[0], sums[1], sums[0] + sums[1], sums[2])
    table.add_row("all", *(f"{n:,.0f}" for n in total), style="bold")
    return table


def _memory_table(summary: Summary) -> Table:
    title = "Peak memory of a rank, MiB"
    table = Table("category", "measured", "formula of the ZeRO paper", title=title)
    for name, row in summary.memory.items():
        formula = f"{row['formula'] / 2**20:,.2f}" if row["formula"] else ""
        table.add_row(name.replace("_", " "), f"{row['peak'] / 2**20:,.2f}", formula)
    table.add_row("whole process (RSS)", f"{summary.peak_rss / 2**20:,.2f}", "")
    return table
