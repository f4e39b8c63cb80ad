"""Wrong input and lack of memory: one clear line, no rank left behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from mpi4py import MPI

import zerompi
from harness.commands import CommandRun
from harness.mpirun import MPIRun


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("train --stages 3", "No such option: --stages"),
        ("train --batch 7 --accumulate 2", "--batch: expected a multiple of "),
        ("train --data /no/such/file", "/no/such/file: No such file or directory"),
        ("train --config /no/such/file", "--config: /no/such/file: No such file or directory"),
        ("train --units Attention", "--units: expected classes among Block, Embedding, GPT,"),
        ("train --shard-ranks 5", "shard_ranks: expected a divisor of "),
        ("train --model /no/such/dir", "--model: /no/such/dir: expected a directory with config"),
        ("train --resume /no/such/dir", "--resume: /no/such/dir: expected a complete checkpoint"),
        ("train --out /dev/null/x", "/dev/null/x"),
        ("trian", "No such command 'trian'"),
    ],
)
def test_wrong_input_is_one_line_of_one_rank_and_status_2(
    comm: MPI.Intracomm,
    command: Callable[..., CommandRun],
    shared_path: Path,
    arguments: str,
    message: str,
) -> None:
    words = arguments.split()
    if words[0] == "train" and "--out" not in words:
        words += ["--out", str(shared_path)]
    run = command(*words)
    assert run.is_refusal(message, comm.rank), run


def test_wrong_input_ends_a_job_without_an_abort(run_mpi: Callable[..., MPIRun]) -> None:
    job = run_mpi(2, ["-m", "zerompi", "train", "--data", "/no/such/file"], timeout=60)
    assert job.returncode == 2, job.output
    assert job.stderr.count("error: ") == 1
    assert "error: /no/such/file: No such file or directory" in job.stderr
    assert "abort" not in job.output.lower()


def test_a_file_that_one_rank_cannot_read_ends_all(
    run_mpi: Callable[..., MPIRun], tmp_path: Path
) -> None:
    script = tmp_path / "differs.py"
    script.write_text(
        "import sys\nfrom mpi4py import MPI\nfrom zerompi.cli import main\n"
        "data = [] if MPI.COMM_WORLD.rank == 0 else ['--data', '/no/such/file']\n"
        "main([*sys.argv[1:], *data])\n"
    )
    job = run_mpi(3, [script, "train", "--batch", "6", "--out", tmp_path / "out"], timeout=60)
    assert job.returncode == 2, job.output
    assert "error: rank 1: /no/such/file: No such file or directory" in job.stderr


def test_a_rank_that_fails_while_training_ends_the_job_with_its_traceback(
    run_mpi: Callable[..., MPIRun], tmp_path: Path
) -> None:
    script = tmp_path / "fails.py"
    script.write_text(
        "from mpi4py import MPI\nfrom zerompi.cli import main\nimport zerompi.train.loop as loop\n"
        "original = loop.training_windows\n"
        "def failing(*args, **kwargs):\n"
        "    if MPI.COMM_WORLD.rank == 1 and kwargs['step'] == 2:\n"
        "        raise KeyError('a bug')\n"
        "    return original(*args, **kwargs)\n"
        "loop.training_windows = failing\n"
        "main()\n"
    )
    words = "train --layers 1 --width 8 --heads 1 --context 8 --batch 4 --steps 100000"
    job = run_mpi(2, [script, *words.split(), "--out", tmp_path / "out"], timeout=60)
    assert job.returncode != 0
    assert "KeyError: 'a bug'" in job.stderr


def test_checkpoints_of_an_earlier_run_are_not_mixed_with_a_new_one(
    run_mpi: Callable[..., MPIRun], tmp_path: Path
) -> None:
    (tmp_path / "checkpoints" / "step-3").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-3" / "state.json").write_text("{}")
    job = run_mpi(1, ["-m", "zerompi", "train", "--out", tmp_path])
    assert job.returncode == 2
    assert "has checkpoints of an earlier run; --resume continues from step-3" in job.stderr


def test_a_rank_without_memory_ends_the_job_with_advice(
    run_mpi: Callable[..., MPIRun], tmp_path: Path
) -> None:
    script = tmp_path / "limited.py"
    script.write_text(
        "import resource\nfrom mpi4py import MPI\nfrom zerompi.cli import main\n"
        "import torch, rich.table, zerompi.train.loop\n"
        "if MPI.COMM_WORLD.rank == 1:\n"
        "    used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "    resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, used + 2**28))\n"
        "main()\n"
    )
    words = "train --stage 0 --layers 2 --width 2048 --heads 8 --batch 2 --context 8 --steps 1"
    job = run_mpi(2, [script, *words.split(), "--out", tmp_path / "out"], timeout=100)
    assert job.returncode != 0
    assert "error: rank 1: out of memory" in job.stderr
    assert "try --stage 3, more ranks" in job.stderr
    assert "Traceback" not in job.output


@pytest.mark.parametrize("ranks", [1, 3])
def test_info_shows_the_job(run_mpi: Callable[..., MPIRun], ranks: int) -> None:
    job = run_mpi(ranks, ["-m", "zerompi", "info"])
    assert job.returncode == 0, job.output
    for word in (
        "MPI library",
        "thread level",
        "threads per rank",
        "16-bit sums",
        "memory",
        "torch",
    ):
        assert job.stdout.count(word) == 1
    assert f"ranks {', '.join(map(str, range(ranks)))} " in job.stdout


@pytest.mark.parametrize("words", [[], ["train"], ["bench"], ["info"]])
def test_every_command_has_help_with_an_example(
    comm: MPI.Intracomm, command: Callable[..., CommandRun], words: list[str]
) -> None:
    run = command(*words, "--help")
    assert run.status == 0
    assert ("Example: mpiexec -n 4 zerompi" in run.stdout) == (comm.rank == 0)


def test_the_version_is_told_once(comm: MPI.Intracomm, command: Callable[..., CommandRun]) -> None:
    run = command("--version")
    assert run.status == 0
    assert run.stdout == (f"zerompi {zerompi.__version__}\n" if comm.rank == 0 else "")
