"""`zerompi train` as users run it: under mpiexec."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mpi4py import MPI

from harness.commands import CommandRun
from harness.mpirun import MPIRun
from zerompi.train.model import Block, GPTConfig

Train = Callable[..., Any]


@pytest.mark.parametrize("changes", [{"stage": 0}, {"stage": 3, "accumulate": 2}])
def test_a_job_trains_and_writes_what_it_measured(train: Train, changes: dict[str, int]) -> None:
    run = train(2, steps=30, eval_every=0, **changes)
    losses = [loss for kind, _, loss in run.losses if kind == "train"]
    assert len(losses) == 30
    assert losses[-1] < losses[0] - 1
    summary = run.summary
    assert summary["result"]["validation_loss"] == run.losses[-1][2]
    assert summary["run"]["ranks"] == 2
    counted = {
        label: sum(levels.values())
        for label, levels in summary["traffic"].items()
        if label != "header"
    }
    assert counted == summary["traffic_theory"]
    for category in ("parameters", "gradients", "optimizer_states"):
        measured = summary["memory"][category]
        assert measured["peak"] == pytest.approx(measured["formula"], rel=0.05)
    assert list((run.out / "tensorboard").glob("events.out.tfevents*"))
    for words in ("validation loss", "unigram entropy", "tokens/s", "the model continues"):
        assert words in run.job.stdout
    assert run.job.stdout.count("steps of 128 tokens") == 1


def test_the_theory_of_a_job_knows_what_stays(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZEROMPI_SHARED_MEMORY", "0")
    run = train(2, steps=3, eval_every=0, accumulate=2, no_reshard_last=True)
    counted = {label: sum(levels.values()) for label, levels in run.summary["traffic"].items()}
    del counted["header"]
    assert counted == run.summary["traffic_theory"]
    # Of two blocks and the rest, only the first block is gathered twice.
    first = sum(p.numel() for p in Block(GPTConfig(layers=2, width=32, heads=2)).parameters())
    gathered = run.summary["run"]["parameters"] + first
    assert counted["all_gather"] == 2 * 4 * gathered / 2  # passes, bytes; one of two ranks


@pytest.mark.slow
def test_losses_do_not_depend_on_the_number_of_ranks(train: Train) -> None:
    one, *others = (train(ranks, f"out-{ranks}").losses for ranks in (1, 2, 4))
    for losses in others:
        assert [key[:2] for key in losses] == [key[:2] for key in one]
        assert [key[2] for key in losses] == pytest.approx([key[2] for key in one], rel=1e-5)


@pytest.mark.slow
def test_a_resumed_job_repeats_the_losses_bit_for_bit(train: Train) -> None:
    whole = train(2, "whole")
    parts = train(2, "parts", save_every=2)
    checkpoints = parts.out / "checkpoints"
    assert {path.name for path in checkpoints.iterdir()} == {"step-4", "step-6", "latest"}
    shutil.rmtree(checkpoints / "step-6")
    resumed = train(2, "parts", resume=True, save_every=2, keep=1)
    assert f"continuing from {checkpoints / 'step-4'} after step 4" in resumed.job.stdout
    assert resumed.losses == whole.losses
    assert [line["grad_norm"] for line in resumed.metrics if line["kind"] == "train"] == [
        line["grad_norm"] for line in whole.metrics if line["kind"] == "train"
    ]
    assert {path.name for path in checkpoints.iterdir()} == {"step-6", "latest"}
    finished = train(2, "parts", resume=True, save_every=2, keep=1)
    assert finished.summary["result"]["train_loss"] is None
    assert finished.losses == whole.losses


@pytest.mark.slow
def test_a_job_resumed_at_another_rank_count_goes_on_alike(train: Train) -> None:
    whole = train(1, "whole")
    step = train(4, "parts", save_every=4).out / "checkpoints" / "step-4"
    shutil.rmtree(step.with_name("step-6"))
    resumed = train(2, "parts", resume=step, stage=1)
    assert [key[2] for key in resumed.losses] == pytest.approx(
        [key[2] for key in whole.losses], rel=1e-5
    )


_SIGNALLED = """
import os, signal, sys, threading, time
from pathlib import Path
from mpi4py import MPI
from zerompi.cli import main

def send(metrics):
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 5:
        time.sleep(0.01)
    os.kill(os.getpid(), signal.{signal})

if MPI.COMM_WORLD.rank == 1:
    path = Path(sys.argv[sys.argv.index("--out") + 1]) / "metrics.jsonl"
    threading.Thread(target=send, args=(path,), daemon=True).start()
main()
"""


@pytest.mark.parametrize("signal", ["SIGUSR1", "SIGUSR2", "SIGTERM"])
def test_a_signal_to_one_rank_saves_and_ends_the_job(
    run_mpi: Callable[..., MPIRun], tmp_path: Path, signal: str
) -> None:
    script = tmp_path / "signalled.py"
    script.write_text(_SIGNALLED.format(signal=signal))
    words = "train --layers 1 --width 8 --heads 1 --context 8 --batch 4 --steps 100000"
    job = run_mpi(2, [script, *words.split(), "--out", tmp_path / "out"], timeout=60)
    assert job.returncode == 75, job.output
    (saved,) = (tmp_path / "out" / "checkpoints").glob("step-*")
    assert f"stopped by {signal} after step {saved.name[5:]}" in job.stdout
    assert "--resume continues" in job.stdout


def test_a_job_whose_time_is_over_saves_and_ends_with_its_own_status(
    run_mpi: Callable[..., MPIRun], tmp_path: Path
) -> None:
    words = "-m zerompi train --layers 1 --width 8 --heads 1 --context 8 --batch 4 --steps 100000"
    words += " --max-time 0.001 --resume auto"
    job = run_mpi(2, [*words.split(), "--out", tmp_path / "out"], timeout=60)
    assert job.returncode == 75, job.output
    assert "no checkpoint in" in job.stdout
    assert "stopped by the end of its time after step 1;" in job.stdout
    assert (tmp_path / "out" / "checkpoints" / "step-1" / "state.json").is_file()


def test_a_toml_file_configures_a_job_and_the_command_line_wins(
    comm: MPI.Intracomm, command: Callable[..., CommandRun], shared_path: Path
) -> None:
    file, text, out = (shared_path / name for name in ("run.toml", "text", "out"))
    if comm.rank == 0:
        text.mkdir()
        (text / "a.txt").write_text("the quick brown fox " * 100)
        file.write_text(
            f'data = "{text}"\nout = "{out}"\nsteps = 50\nstage = 2\nlayers = 1\n'
            "width = 16\nheads = 2\ncontext = 8\nbatch = 12\nsample = 4\n"
        )
    comm.Barrier()
    run = command("train", "--config", file, "--steps", "2")
    assert run.status == 0, run
    for words in ("2,000 bytes", "stage 2"):
        assert (words in run.stdout) == (comm.rank == 0)
    lines = (out / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] == 2


def test_a_terminal_gets_a_progress_bar_through_mpiexec(
    run_mpi: Callable[..., MPIRun], tmp_path: Path
) -> None:
    script = tmp_path / "on_terminal.py"
    script.write_text(
        "import os, pty, sys\n"
        "from harness.mpirun import launcher\n"
        "command = [*launcher(2), sys.executable, '-m', 'zerompi', *sys.argv[1:]]\n"
        "sys.exit(os.waitstatus_to_exitcode(pty.spawn(command)))\n"
    )
    words = "train --layers 1 --width 8 --heads 1 --context 8 --batch 4 --steps 9 --sample 0"
    tests = Path(__file__).parents[1]
    job = MPIRun.run_command(
        [sys.executable, script, *words.split(), "--out", tmp_path / "out"],
        env={"PYTHONPATH": os.pathsep.join([str(tests), str(tests.parent)])},
    )
    assert job.returncode == 0, job.output
    assert "step 9/9" in job.stdout
    assert "\x1b[" in job.stdout
