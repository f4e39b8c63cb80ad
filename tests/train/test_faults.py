"""Losses and gradients of `zerompi train` that are NaN or infinite: one line that names step and ranks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from harness.mpirun import MPIRun
from zerompi.train.faults import RandomState, describe_losses, start_of_backward

# In its third step the last rank meets the fault that the first argument names.
_FAULTY = """
import math, sys
from zerompi.cli import main
import zerompi.train.loop as loop
from mpi4py import MPI

FAULT = sys.argv.pop(1)
step = 0
windows, logits_of, prepare = loop.training_windows, loop.next_token_logits, loop.prepare

def is_time():
    return step == 3 and MPI.COMM_WORLD.rank == MPI.COMM_WORLD.size - 1

def noted(*args, **kwargs):
    global step
    step = kwargs["step"]
    return windows(*args, **kwargs)

def spoiled(*args):
    logits = logits_of(*args)
    if is_time() and FAULT == "nan-loss":
        logits = logits * math.nan
    if is_time() and FAULT == "inf-loss":
        logits = logits + 0  # a target with no chance: the gradient alone would be finite
        logits.data[..., 32:127] = -math.inf
    return logits

def poisoned(*args):
    job = prepare(*args)
    parameter = dict(job.model.named_parameters())["blocks.0.down.weight"]
    parameter.register_hook(lambda g: g * math.nan if is_time() and FAULT == "gradient" else g)
    return job

loop.training_windows, loop.next_token_logits, loop.prepare = noted, spoiled, poisoned
main()
"""

_LOSS = {
    "nan-loss": "the loss of rank {last} is nan: ",
    "inf-loss": "the loss of rank {last} is inf: ",
}
_WORDS = "train --layers 1 --width 8 --heads 1 --context 8 --batch 12 --steps 6 --sample 0"


@pytest.fixture
def run_faulty(run_mpi: Callable[..., MPIRun], tmp_path: Path) -> Callable[..., MPIRun]:
    """`run_faulty(ranks, fault, options)` runs a job with that fault."""

    def run(ranks: int, fault: str, options: str) -> MPIRun:
        script = tmp_path / "faulty.py"
        script.write_text(_FAULTY)
        words = f"{_WORDS} {options}".split()
        return run_mpi(ranks, [script, fault, *words, "--out", tmp_path / "out"], timeout=60)

    return run


@pytest.mark.parametrize(
    ("ranks", "fault", "stage"),
    [(3, "inf-loss", 2), (4, "gradient", 3), (3, "gradient", 0)],
)
def test_a_fault_ends_the_job_with_one_line_that_names_step_rank_and_parameter(
    run_faulty: Callable[..., MPIRun], tmp_path: Path, ranks: int, fault: str, stage: int
) -> None:
    job = run_faulty(ranks, fault, f"--stage {stage} --save-every 1 --keep 9")
    assert job.returncode == 1, job.output
    (line,) = [line for line in job.stderr.splitlines() if "finite" in line]
    assert line.startswith("error: step 3: ")
    assert "Traceback" not in job.output
    if fault == "gradient":
        cause = f"the backward pass goes wrong on rank {ranks - 1} (blocks.0.down.weight): "
        assert (
            f"{cause}the gradient of blocks.0.down.weight is not finite; the step was not" in line
        )
    else:
        assert _LOSS[fault].format(last=ranks - 1) + "the gradients of embedding.weight" in line
    saved = {path.name for path in (tmp_path / "out" / "checkpoints").glob("step-*")}
    assert saved == {"step-1", "step-2"}


@pytest.mark.parametrize("fault", ["nan-loss", "gradient"])
def test_a_fault_is_skipped_with_one_line_that_names_step_rank_and_parameter(
    run_faulty: Callable[..., MPIRun], tmp_path: Path, fault: str
) -> None:
    job = run_faulty(3, fault, "--nonfinite skip")
    assert job.returncode == 0, job.output
    (line,) = [line for line in job.output.splitlines() if "finite" in line]
    gradient = (
        "the losses are finite; the backward pass goes wrong on rank 2 (blocks.0.down.weight): "
    )
    cause = _LOSS.get(fault, gradient).format(last=2)
    assert line.startswith(f"step 3: {cause}the gradient")
    assert line.endswith("the optimizer step is skipped")
    lines = [json.loads(text) for text in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    losses = {entry["step"]: entry["loss"] for entry in lines if entry["kind"] == "train"}
    assert (losses.pop(3) is None) == (fault != "gradient")
    assert sorted(losses) == [1, 2, 4, 5, 6]
    assert None not in losses.values()


def test_the_backward_pass_of_a_loss_that_is_infinite_starts_with_nan() -> None:
    logits = torch.tensor([[0.0, -torch.inf]], requires_grad=True)
    loss = F.cross_entropy(logits, torch.tensor([1]))
    loss.backward(retain_graph=True)
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    loss.backward(start_of_backward(loss))
    assert logits.grad.isnan().all()
    finite = logits[0, 0] * 3
    assert start_of_backward(finite).item() == 1


def test_what_was_random_can_be_so_again() -> None:
    state = RandomState(torch.device("cpu"))
    drawn = torch.rand(3)
    state.install()
    assert torch.equal(torch.rand(3), drawn)


def test_losses_that_are_not_finite_are_named_by_rank() -> None:
    nan, inf = float("nan"), float("inf")
    assert describe_losses([1.0, 2.0]) is None
    assert describe_losses([1.0, nan, 2.0]) == "the loss of rank 1 is nan"
    assert describe_losses([inf, 1.0, nan]) == "the losses of ranks 0, 2 are inf, nan"
