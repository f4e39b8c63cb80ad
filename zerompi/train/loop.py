"""The training loop of `zerompi train`."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from math import fsum
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch.nn.functional as F
from mpi4py import MPI

from zerompi.errors import NonFiniteError
from zerompi.stop import StopRequest
from zerompi.train.agreement import agree
from zerompi.train.checkpoints import prepare_output, save_checkpoint
from zerompi.train.config import TrainConfig
from zerompi.train.data import training_windows
from zerompi.train.display import Display, StepMetrics, make_console, make_display
from zerompi.train.evaluate import Evaluation, evaluate
from zerompi.train.faults import RandomState, SkippedSteps, find_cause, start_of_backward
from zerompi.train.job import Job, prepare, restore
from zerompi.train.memory import peak_rss
from zerompi.train.metrics import MetricsLog, write_whole
from zerompi.train.model import next_token_logits
from zerompi.train.sample import sample_continuation
from zerompi.train.summary import Meter, Summary, print_summary, summarise
from zerompi.watchdog import Watch, waiting


class _Outcome(NamedTuple):
    """How a step went, over all ranks."""

    metrics: StepMetrics
    stops: bool


def train(config: TrainConfig, comm: MPI.Intracomm) -> Summary | None:
    """Train, evaluate, sample, and write everything under `config.out`. Collective.

    Returns:
        The summary, on all ranks; None if a signal, or the end of its time, stopped the run.

    Raises:
        InputError: the configuration cannot be used; the same on all ranks, before training.
        NonFiniteError: of a step, a loss or gradient; the same on all ranks.
    """
    watch = Watch(comm) if comm.size > 1 else None  # a partition has its own, but there is none yet
    with StopRequest(config.max_time, margin=config.margin) as stop:
        summary = _train(config, comm, stop)
    if watch is not None:
        watch.close()  # not after an exception: it is collective
    return summary


def _train(config: TrainConfig, comm: MPI.Intracomm, stop: StopRequest) -> Summary | None:
    path = prepare_output(config, comm)
    job = prepare(config, comm)
    done = 0 if path is None else restore(job, path)
    log: MetricsLog | None = agree(
        comm, lambda: MetricsLog(Path(config.out), done + 1) if comm.rank == 0 else None
    )
    display = make_display(config.progress, job.num_steps, done, shows=comm.rank == 0)
    _introduce(job, done, path, display)
    try:
        summary = _Run(job, log, display, stop, done).run()
    finally:
        display.close()
        if log is not None:
            log.close()
    agree(comm, job.zero.close)  # not after an exception: it is collective
    return summary


def _introduce(job: Job, done: int, path: Path | None, display: Display) -> None:
    corpus, config = job.corpus, job.config
    display.say(
        f"{corpus.name}: {corpus.num_bytes:,} bytes, the last {corpus.held_out_bytes:,} held out; "
        f"unigram entropy {corpus.unigram_entropy:.3f} bits per byte"
    )
    display.say(
        f"{job.numel:,} parameters, {config.dtype}, stage {config.stage}, {job.topology.size} "
        f"ranks on {job.topology.num_nodes} node{'s' * (job.topology.num_nodes > 1)}, {job.device.type}; "
        f"{job.num_steps} steps of {config.tokens_per_step:,} tokens"
    )
    if path is not None:
        display.say(f"continuing from {path} after step {done}")
    elif config.resume is not None:
        display.say(f"no checkpoint in {config.out} yet: starting from the beginning")


class _Run:
    """A job while it trains, from the step after `done` on."""

    def __init__(
        self, job: Job, log: MetricsLog | None, display: Display, stop: StopRequest, done: int
    ) -> None:
        self.job = job
        self.log = log
        self.display = display
        self.stop = stop
        self.done = done
        self.meter = Meter()
        self.skipped = SkippedSteps()

    def run(self) -> Summary | None:
        """Train until the last step, or until a stop is requested."""
        job, config = self.job, self.job.config
        saved = self.done
        loss: float | None = None
        evaluation: Evaluation | None = None
        for step in range(self.done + 1, job.num_steps + 1):
            outcome = self._step(step, evaluated_before=evaluation is not None)
            loss, evaluation = outcome.metrics.loss, None
            self._record(outcome.metrics)
            if config.eval_every and step % config.eval_every == 0:
                evaluation = self._evaluate(step)
            if outcome.stops or (config.save_every and step % config.save_every == 0):
                blocking = outcome.stops or not config.save_in_background
                path = save_checkpoint(job, step, blocking=blocking)
                saved = step
                if outcome.stops:
                    self._say_stopped(step, path)
                    return None
        if config.save_every and saved < job.num_steps:
            save_checkpoint(job, job.num_steps)
        evaluation = evaluation or self._evaluate(max(self.done, job.num_steps))
        return self._finish(loss, evaluation)

    def _step(self, step: int, *, evaluated_before: bool) -> _Outcome:
        job, config = self.job, self.job.config
        start = time.perf_counter()
        random = RandomState(job.device)
        loss = self._passes(step)
        norm = float(job.zero.clip_grad_norm_(config.clip or float("inf")))
        lr = job.optimizer.param_groups[0]["lr"]
        self._update(step, loss, random)
        job.scheduler.step()
        everyone = self._exchange(loss)
        if everyone[:, 3].any():
            self.skipped.tell(step, self._cause(step, everyone[:, 0].tolist(), random))
        seconds = time.perf_counter() - start
        self.meter.add(job.zero.report(), seconds, evaluated_before=evaluated_before)
        metrics = StepMetrics(
            step=step,
            loss=fsum(everyone[:, 0]) / job.comm.size,
            lr=lr,
            grad_norm=norm,
            tokens_per_second=config.tokens_per_step / seconds,
            peak_rss=int(everyone[:, 2].max()),
        )
        return _Outcome(metrics, self.stop.conclude(int(everyone[:, 1].max())))

    def _passes(self, step: int) -> float:
        """Forward and backward passes of a step; the mean of this rank's losses. Collective."""
        job, config = self.job, self.job.config
        losses = []
        with job.zero.accumulate(config.accumulate):
            for turn in range(config.accumulate):
                first = (turn * job.comm.size + job.comm.rank) * job.rows
                inputs, targets = training_windows(
                    job.corpus.train,
                    config.context,
                    seed=config.seed,
                    step=step,
                    samples=range(first, first + job.rows),
                )
                logits = next_token_logits(job.model, inputs.to(job.device))
                loss = F.cross_entropy(logits.flatten(0, 1), targets.to(job.device).flatten())
                loss.backward(None if config.nonfinite == "ignore" else start_of_backward(loss))
                losses.append(float(loss.detach()))
        return fsum(losses) / len(losses)

    def _update(self, step: int, loss: float, random: RandomState) -> None:
        """Step the optimizer. Collective.

        Raises:
            NonFiniteError: a gradient is NaN or infinite; names the step and the ranks, too.
        """
        job = self.job
        try:
            with self.skipped.kept():
                job.optimizer.step()
        except NonFiniteError as error:
            job.optimizer.zero_grad()
            with waiting("the losses of a step whose gradient is not finite"):
                losses = job.comm.allgather(loss)
            cause = self._cause(step, losses, random)
            raise NonFiniteError(f"step {step}: {cause}: {error}") from None
        job.optimizer.zero_grad()

    def _cause(self, step: int, losses: Sequence[float], random: RandomState) -> str:
        """Where a step went wrong, by its passes once more if need be. Collective.

        What was random in them is the same again, and what follows as if they had not been repeated.
        """
        job = self.job
        after = RandomState(job.device)

        def repeat() -> None:
            random.install()
            self._passes(step)

        try:
            return find_cause(job.model, job.comm, losses, repeat)
        finally:
            after.install()
            job.optimizer.zero_grad()

    def _exchange(self, loss: float) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
        """Loss, request to stop, memory, and whether a step was skipped, of every rank; (ranks, 4)."""
        own = np.array([loss, self.stop.look(), peak_rss(), self.skipped.has_any], dtype=np.float64)
        everyone = np.empty((self.job.comm.size, 4), dtype=np.float64)
        with waiting("losses of all ranks"):
            self.job.comm.Allgather(own, everyone)
        return everyone

    def _record(self, metrics: StepMetrics) -> None:
        self.display.step(metrics)
        if self.log is not None:
            values = metrics._asdict()
            self.log.write("train", values.pop("step"), **values)

    def _evaluate(self, step: int) -> Evaluation:
        job, config = self.job, self.job.config
        evaluation = evaluate(
            job.model,
            job.corpus,
            job.comm,
            device=job.device,
            context=config.context,
            num_windows=config.eval_batches * config.batch,
            rows=job.rows,
        )
        self.display.say(
            f"step {step}: validation loss {evaluation.loss:.4f}, {evaluation.bits_per_byte:.3f} "
            f"bits per byte (unigram entropy {job.corpus.unigram_entropy:.3f})"
        )
        if self.log is not None and step > self.done:
            self.log.write(
                "eval",
                step,
                loss=evaluation.loss,
                bits_per_byte=evaluation.bits_per_byte,
                unigram_bits_per_byte=job.corpus.unigram_entropy,
            )
        return evaluation

    def _say_stopped(self, step: int, path: Path) -> None:
        self.display.say(
            f"stopped by {self.stop.reason} after step {step}; saved {path}; the same "
            "command with --resume continues"
        )

    def _finish(self, loss: float | None, evaluation: Evaluation) -> Summary:
        job, config = self.job, self.job.config
        prompt = job.corpus.held_out[: min(64, config.context)].tolist()
        sampled = sample_continuation(
            job.model,
            prompt,
            config.sample,
            job.comm,
            device=job.device,
            context=config.context,
            seed=config.seed,
        )
        text = job.corpus.codec.decode(sampled)
        summary = summarise(job, self.meter, loss, evaluation, text)
        self.display.close()
        if self.log is not None:
            if config.sample:
                self.log.text("sample", text, job.num_steps)
                start = job.corpus.codec.decode(prompt)
                print(f"\nThe held-out text begins\n{start}\nand the model continues\n{text}\n")
            print_summary(summary, make_console())
        content = json.dumps(summary.as_dict(), indent=2) + "\n"
        path = Path(config.out) / "summary.json"
        agree(job.comm, lambda: write_whole(path, content) if job.comm.rank == 0 else None)
        if self.log is not None:
            print(f"metrics, TensorBoard and summary: {config.out}", flush=True)
        return summary
