"""Which checkpoint is the latest, and what killed writers leave behind."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from mpi4py import MPI
from safetensors.torch import load_file

from zerompi.checkpoint import directory, find_latest, remove_leftovers

SAVE = textwrap.dedent(
    """
    import os, pathlib, signal, sys
    import torch
    import zerompi
    from mpi4py import MPI
    from zerompi.checkpoint import Slice, TensorSpec, TensorTable, directory, write_checkpoint

    path, rank, call, name = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    comm = MPI.COMM_WORLD
    owner = {"os": os, "Path": pathlib.Path}[name.split(".")[0]]
    method = name.split(".")[1]
    original, calls = getattr(owner, method), []

    def deadly(*args):
        calls.append(args)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args)

    if name == "Path.rename":
        directory.exchange = lambda first, second: False
    if comm.rank == rank:
        setattr(owner, method, deadly)
    names = [f"w{i}" for i in range(3)]
    values = torch.full((100,), 2.0)
    cut = [0, 30, 100]
    table = TensorTable(
        {n: TensorSpec((100,), torch.float32) for n in names},
        [Slice(n, *cut[comm.rank:comm.rank + 2], values[slice(*cut[comm.rank:comm.rank + 2])]) for n in names],
    )
    write_checkpoint(pathlib.Path(path), table, TensorTable({}, []), {}, comm)
    """
)


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def leftover(directory: Path, kind: str, host: str, pid: int, name: str = "step-7") -> Path:
    path = directory / f".{name}.{kind}-{host}-{pid}-0123abcd"
    path.mkdir()
    (path / "model.safetensors").write_text(kind)
    return path


# -- the latest --------------------------------------------------------------------------------


def test_the_latest_is_the_complete_one_of_the_largest_step(tmp_path, save) -> None:
    for step in (9, 100, 20):
        save(tmp_path / f"step-{step}", {"a": torch.ones(2)}, MPI.COMM_SELF)
    for other in ("step-200", "step-x", "step-300-best", "last"):
        (tmp_path / other).mkdir()
    (tmp_path / "step-400").write_text("a file")
    leftover(tmp_path, "tmp", "host", 1)
    assert find_latest(tmp_path) == tmp_path / "step-100"


def test_there_may_be_no_latest(tmp_path) -> None:
    assert find_latest(tmp_path) is None
    assert find_latest(tmp_path / "absent") is None


def test_latest_moves_to_each_new_step_and_older_ones_go(tmp_path, save) -> None:
    for step in (1, 2, 30, 4):
        save(tmp_path / f"step-{step}", {"a": torch.ones(2)}, MPI.COMM_SELF, keep=2)
        assert (tmp_path / "latest").readlink() == Path(f"step-{step}")
    # Older than 4 is what had fewer steps.
    assert {p.name for p in tmp_path.iterdir()} == {"step-2", "step-4", "step-30", "latest"}
    assert load_file(tmp_path / "latest/model.safetensors").keys() == {"a"}


def test_other_names_are_no_series_and_a_latest_of_others_stays(tmp_path, save) -> None:
    save(tmp_path / "best", {"a": torch.ones(2)}, MPI.COMM_SELF, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["best"]
    (tmp_path / "latest").write_text("a file")
    save(tmp_path / "step-1", {"a": torch.ones(2)}, MPI.COMM_SELF, keep=1)
    assert (tmp_path / "latest").read_text() == "a file"


def test_where_directories_can_be_exchanged_the_path_is_never_empty(
    tmp_path, save, monkeypatch
) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    if not directory.exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this file system cannot exchange directories")
    save(tmp_path / "step-1", {"a": torch.ones(2)}, MPI.COMM_SELF)
    monkeypatch.setattr(Path, "rename", None)
    save(tmp_path / "step-1", {"b": torch.ones(2)}, MPI.COMM_SELF)
    assert load_file(tmp_path / "step-1/model.safetensors").keys() == {"b"}
    assert {p.name for p in tmp_path.iterdir()} == {"a", "b", "step-1", "latest"}


# -- leftovers ---------------------------------------------------------------------------------


def test_leftovers_of_dead_writers_are_removed(tmp_path, save) -> None:
    save(tmp_path / "step-7", {"a": torch.ones(2)}, MPI.COMM_SELF)
    host = socket.gethostname()
    leftover(tmp_path, "tmp", host, dead_pid())
    leftover(tmp_path, "old", host, dead_pid())
    elsewhere = leftover(tmp_path, "tmp", "another-host", 1)
    for path in (*elsewhere.iterdir(), elsewhere):
        os.utime(path, (0, 0))
    (tmp_path / f".latest.tmp-{host}-{dead_pid()}-0123abcd").symlink_to("step-7")
    remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"step-7", "latest"}


def test_a_checkpoint_moved_aside_comes_back(tmp_path) -> None:
    leftover(tmp_path, "old", socket.gethostname(), dead_pid())
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-7"]
    assert (tmp_path / "step-7/model.safetensors").read_text() == "old"


def test_living_writers_and_all_else_are_left_alone(tmp_path) -> None:
    leftover(tmp_path, "tmp", socket.gethostname(), os.getpid())
    leftover(tmp_path, "tmp", "another-host", 1)
    (tmp_path / ".step-7.tmp").mkdir()
    (tmp_path / ".cache").mkdir()
    (tmp_path / f".file.tmp-{socket.gethostname()}-{dead_pid()}-0123abcd").write_text("")
    before = sorted(tmp_path.rglob("*"))
    remove_leftovers(tmp_path)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_missing_directory_has_no_leftovers(tmp_path) -> None:
    remove_leftovers(tmp_path / "absent")
    assert not (tmp_path / "absent").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank", "name", "call", "existing"),
    [(1, "os.pwrite", 2, False), (0, "os.pwrite", 3, True), (0, "Path.rename", 1, True)],
)
def test_a_killed_writer_leaves_the_path_as_it_was(
    rank, name, call, existing, tmp_path, save, run_mpi
) -> None:
    path = tmp_path / "step-1"
    if existing:
        save(path, {"old": torch.ones(3)}, MPI.COMM_SELF)
    result = run_mpi(2, ["-c", SAVE, path, rank, call, name], timeout=60)
    assert result.returncode != 0
    assert path.exists() == existing
    assert len(list(tmp_path.iterdir())) == 1 + 2 * existing, result.output
    remove_leftovers(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == ({"step-1", "latest"} if existing else set())
    if existing:
        assert load_file(path / "model.safetensors").keys() == {"old"}


@pytest.mark.slow
def test_a_writer_killed_between_the_renames_loses_nothing(tmp_path, save, run_mpi) -> None:
    path = tmp_path / "step-1"
    save(path, {"old": torch.ones(3)}, MPI.COMM_SELF)
    result = run_mpi(2, ["-c", SAVE, path, 0, 2, "Path.rename"], timeout=60)
    assert result.returncode != 0
    assert not path.exists()
    remove_leftovers(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"step-1", "latest"}
    assert load_file(path / "model.safetensors").keys() == {"old"}


@pytest.mark.slow
def test_the_next_save_succeeds_beside_a_leftover(tmp_path, save, run_mpi) -> None:
    path = tmp_path / "step-1"
    run_mpi(2, ["-c", SAVE, path, 1, 2, "os.pwrite"], timeout=60)
    result = run_mpi(2, ["-c", SAVE, path, 1, 1000, "os.pwrite"], timeout=60)
    assert result.returncode == 0, result.output
    assert find_latest(tmp_path) == path
    assert torch.equal(load_file(path / "model.safetensors")["w1"], torch.full((100,), 2.0))
