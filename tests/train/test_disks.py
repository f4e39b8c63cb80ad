"""Disks that are full, read-only or damaged: `zerompi train` says so in one line and overwrites nothing."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mpi4py import MPI

from harness.commands import CommandRun
from harness.disks import Disk
from harness.mpirun import MPIRun
from zerompi.train.metrics import WholeRecords

_WORDS = (
    "-m zerompi train --layers 1 --width 128 --heads 2 --context 8 --batch 12 --steps 12 --sample 0 "
    "--save-every 3 --keep 0 --eval-every 0 --eval-batches 1 --resume auto"
)
_NBYTES = 3 << 20  # of a checkpoint, nearly


def error_of(job: MPIRun) -> str:
    """The one line with which a job has ended."""
    assert job.returncode == 2, job.output
    assert "Traceback" not in job.output
    (line,) = [line for line in job.stderr.splitlines() if line.startswith("error: ")]
    return line


def contents(directory: Path) -> dict[Path, bytes]:
    """Every file below `directory`."""
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """A file system that has room for two checkpoints."""
    mounted = Disk.mount(tmp_path / "disk", f"size={_NBYTES * 5 // 2}")
    if mounted is None:
        pytest.skip("cannot mount a small file system")
    yield mounted
    mounted.unmount()


@pytest.mark.slow
@pytest.mark.parametrize("option", ["--no-save-in-background", "--save-in-background"])
def test_a_full_disk_ends_the_job_and_with_more_room_it_goes_on(
    run_mpi: Callable[..., MPIRun], disk: Disk, option: str
) -> None:
    words = [*_WORDS.split(), option, "--out", disk.path]
    line = error_of(run_mpi(3, words, timeout=60))
    assert "safetensors: No space left on device" in line
    checkpoints = disk.path / "checkpoints"
    assert {path.name for path in checkpoints.iterdir()} == {"step-3", "step-6", "latest"}
    assert os.readlink(checkpoints / "latest") == "step-6"
    disk.remount(f"size={_NBYTES * 5}")
    job = run_mpi(3, words, timeout=60)
    assert job.returncode == 0, job.output
    assert f"continuing from {checkpoints}/step-6 after step 6" in job.stdout


@pytest.mark.slow
def test_a_read_only_directory_ends_the_job(run_mpi: Callable[..., MPIRun], tmp_path: Path) -> None:
    mounted = Disk.mount(tmp_path / "out" / "checkpoints", "ro")
    if mounted is None:
        pytest.skip("cannot mount a small file system")
    try:
        job = run_mpi(
            3, [*_WORDS.split(), "--save-in-background", "--out", tmp_path / "out"], timeout=60
        )
    finally:
        mounted.unmount()
    line = error_of(job)
    assert f"{mounted.path}/.step-3" in line
    assert line.endswith(": Read-only file system")


def test_metrics_do_not_end_a_run_whose_disk_is_full_and_its_summary_does(
    run_mpi: Callable[..., MPIRun], tmp_path: Path
) -> None:
    mounted = Disk.mount(tmp_path / "small", "size=40k")
    if mounted is None:
        pytest.skip("cannot mount a small file system")
    words = (
        "-m zerompi train --layers 1 --width 8 --heads 1 --context 8 --batch 12 --steps 300 "
        "--sample 0 --save-every 0 --eval-every 0 --eval-batches 1 --progress lines"
    )
    try:
        job = run_mpi(3, [*words.split(), "--out", mounted.path], timeout=60)
        lines = (mounted.path / "metrics.jsonl").read_text().splitlines()
        (board,) = (mounted.path / "tensorboard").iterdir()
        records = num_records(board.read_bytes())
        names = {path.name for path in mounted.path.iterdir()}
    finally:
        mounted.unmount()
    assert error_of(job) == f"error: rank 0: {mounted.path}/summary.json: No space left on device"
    assert "step 300/300" in job.stdout
    without = "No space left on device; training goes on without what cannot be written there"
    for path in (mounted.path / "metrics.jsonl", board):
        assert job.stderr.count(f"{path}: {without}\n") == 1, job.output
    assert 0 < len([json.loads(line) for line in lines]) < 300
    assert records > 0
    assert names == {"metrics.jsonl", "tensorboard"}


def num_records(raw: bytes) -> int:
    """How many records of TensorBoard these are: a length, data, and a checksum of each."""
    count = 0
    while raw:
        end = 16 + int.from_bytes(raw[:8], "little")
        assert end <= len(raw), "the last record is cut"
        raw, count = raw[end:], count + 1
    return count


def test_what_comes_when_there_is_room_again_is_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mounted = Disk.mount(tmp_path / "small", "size=8k")
    if mounted is None:
        pytest.skip("cannot mount a small file system")
    try:
        records = WholeRecords(mounted.path / "lines", appends=True)
        for text in ("a" * 5000, "b" * 5000, "c" * 5000, "d" * 1000):
            records.append(text.encode())
        mounted.remount("size=80k")
        records.append(b"e" * 5000)
        records.close()
        written = (mounted.path / "lines").read_text()
    finally:
        mounted.unmount()
    assert written == "a" * 5000 + "d" * 1000 + "e" * 5000
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith(f"{mounted.path}/lines: No space left on device; training goes on")


def _flip(directory: Path) -> None:
    raw = bytearray((directory / "model.safetensors").read_bytes())
    raw[-9] ^= 4
    (directory / "model.safetensors").write_bytes(raw)


def _cut(directory: Path) -> None:
    path = directory / "optimizer.safetensors"
    os.truncate(path, path.stat().st_size - 100)


_DAMAGES: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "a flipped bit": (_flip, "", r"model.safetensors: bytes [1"),
    "a truncated file": (_cut, "", "optimizer.safetensors: expected "),
    "a missing file": (
        lambda directory: (directory / "model.safetensors").unlink(),
        "",
        "model.safetensors: expected a file, got nothing there",
    ),
    "another model": (
        lambda directory: None,
        "--width 64",
        "the checkpoint is not of this model: embedding.weight: expected shape (256, 64), got (256, 128)",
    ),
}


def test_a_checkpoint_that_is_damaged_or_of_another_model_is_not_continued(
    comm: MPI.Intracomm, command: Callable[..., CommandRun], shared_path: Path
) -> None:
    words = _WORDS.split()[2:]
    whole = shared_path / "whole"
    assert command(*words, "--steps", "6", "--out", whole).status == 0
    for number, (damage, options, said) in enumerate(_DAMAGES.values()):
        out = shared_path / str(number)
        if comm.rank == 0:
            shutil.copytree(whole, out, symlinks=True)
            damage(out / "checkpoints" / "step-6")
        comm.Barrier()
        before = contents(out)
        run = command(*words, *options.split(), "--out", out)
        assert run.is_refusal(said, comm.rank), run
        assert contents(out) == before
        assert os.readlink(out / "checkpoints" / "latest") == "step-6"
