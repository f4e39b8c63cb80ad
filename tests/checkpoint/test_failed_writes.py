"""A checkpoint that cannot be written: all ranks say so, and nothing has changed on the disk."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from mpi4py import MPI
from safetensors.torch import load_file

from zerompi.agreement import agree_error
from zerompi.checkpoint import (
    CheckpointError,
    Slice,
    TensorSpec,
    TensorTable,
    directory,
    write_checkpoint,
)
from zerompi.errors import MismatchError, ZerompiError

NOTHING = TensorTable({}, [])


def contents(directory: Path, comm: MPI.Intracomm) -> dict[str, bytes]:
    """Every file below `directory`, after all ranks are done with it."""
    comm.Barrier()
    found = {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }
    comm.Barrier()
    return found


def fail_on(rank: int, comm: MPI.Intracomm, name: str, code: int, monkeypatch) -> None:
    """Let `os.name` fail on one rank from its second call on."""
    original, calls = getattr(os, name), []

    def failing(*args):
        calls.append(args)
        if len(calls) > 1:
            raise OSError(code, os.strerror(code))
        return original(*args)

    if comm.rank == rank:
        monkeypatch.setattr(os, name, failing)


@pytest.mark.parametrize("existing", [False, True], ids=["nothing before", "replacing"])
@pytest.mark.parametrize("which", ["first", "last"])
@pytest.mark.parametrize(("name", "code"), [("pwrite", errno.ENOSPC), ("fsync", errno.EIO)])
def test_a_failed_write_of_one_rank_fails_all_and_changes_nothing(
    name, code, which, existing, save, shared_path, comm, random_tensors, monkeypatch
) -> None:
    rank = 0 if which == "first" else comm.size - 1
    if existing:
        save(shared_path / "c", random_tensors(0), comm, state={"extra": "old"})
    before = contents(shared_path, comm)
    optimizer = {f"exp_avg.{key}": t for key, t in random_tensors(2).items()}
    with monkeypatch.context() as patch:
        fail_on(rank, comm, name, code, patch)
        with pytest.raises(CheckpointError, match=os.strerror(code)) as caught:
            save(shared_path / "c", random_tensors(1), comm, optimizer=optimizer)
    if comm.size > 1:
        assert f"rank {rank}: " in str(caught.value)
    assert ".safetensors" in str(caught.value)
    assert contents(shared_path, comm) == before
    assert [p.name for p in shared_path.iterdir()] == (["c"] if existing else [])
    save(shared_path / "c", random_tensors(1), comm)
    assert load_file(shared_path / "c/model.safetensors").keys() == random_tensors(1).keys()


@pytest.mark.parametrize("failing_call", [1, 2])
def test_a_failed_rename_leaves_what_was_there(
    failing_call, save, shared_path, comm, random_tensors, monkeypatch
) -> None:
    save(shared_path / "c", random_tensors(0), comm)
    before, calls, original = contents(shared_path, comm), [], Path.rename

    def rename(self, target):
        calls.append(target)
        if len(calls) == failing_call:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return original(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(directory, "exchange", lambda first, second: False)
        patch.setattr(Path, "rename", rename)
        with pytest.raises(CheckpointError, match=os.strerror(errno.EIO)):
            save(shared_path / "c", random_tensors(1), comm)
    assert contents(shared_path, comm) == before
    assert [p.name for p in shared_path.iterdir()] == ["c"]


def test_a_file_system_of_one_rank_only_is_named(
    save, shared_path, comm, random_tensors, monkeypatch
) -> None:
    original = os.open

    def open_elsewhere(path, flags, *args, **kwargs):
        if flags == os.O_WRONLY and comm.rank == comm.size - 1:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        return original(path, flags, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", open_elsewhere)
        with pytest.raises(CheckpointError, match="file system that all ranks share"):
            save(shared_path / "c", random_tensors(0), comm)
    assert contents(shared_path, comm) == {}


def test_short_writes_are_continued(save, shared_path, comm, random_tensors, monkeypatch) -> None:
    original = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, raw, offset: original(fd, raw[:3], offset))
    save(shared_path / "c", random_tensors(0), comm)
    for name, tensor in load_file(shared_path / "c/model.safetensors").items():
        assert torch.equal(tensor, random_tensors(0)[name])


def test_an_existing_checkpoint_is_replaced_as_a_whole(
    save, shared_path, comm, random_tensors
) -> None:
    save(shared_path / "c", random_tensors(0), comm, optimizer={"m.a": torch.ones(3)})
    save(shared_path / "c", {"a": torch.zeros(2)}, comm)
    files = contents(shared_path, comm)
    assert sorted(files) == ["c/model.safetensors", "c/state.json"]
    assert load_file(shared_path / "c/model.safetensors").keys() == {"a"}


def test_missing_parents_are_created(save, shared_path, comm) -> None:
    save(shared_path / "a" / "b" / "c", {"a": torch.zeros(2)}, comm)
    assert (shared_path / "a/b/c/model.safetensors").exists()


def test_a_symbolic_link_to_a_checkpoint_stays_one(save, shared_path, comm) -> None:
    save(shared_path / "step-1", {"a": torch.zeros(2)}, comm)
    if comm.rank == 0:
        (shared_path / "last").symlink_to("step-1")
    save(shared_path / "last", {"b": torch.zeros(2)}, comm)
    assert (shared_path / "last").is_symlink()
    assert load_file(shared_path / "step-1/model.safetensors").keys() == {"b"}


@pytest.mark.parametrize("kind", ["file", "directory of other things", "file as a parent"])
def test_what_is_no_checkpoint_is_never_replaced(kind, save, shared_path, comm) -> None:
    path = shared_path / "c"
    if comm.rank == 0:
        if kind == "directory of other things":
            path.mkdir()
            (path / "thesis.tex").write_text("years of work")
        else:
            path.write_text("years of work")
    before = contents(shared_path, comm)
    target = path / "step-1" if kind == "file as a parent" else path
    with pytest.raises(CheckpointError, match=str(path)):
        save(target, {"a": torch.zeros(2)}, comm)
    assert contents(shared_path, comm) == before


# -- refused before anything is written --------------------------------------------------------


def refused(
    shared_path: Path, comm: MPI.Intracomm, slices: list[Slice], match: str, numel: int = 8
) -> None:
    table = TensorTable({"w": TensorSpec((numel,), torch.float32)}, slices)
    with pytest.raises(CheckpointError, match=match):
        write_checkpoint(shared_path / "c", table, NOTHING, {}, comm)
    comm.Barrier()
    assert list(shared_path.iterdir()) == []


@pytest.mark.parametrize(
    ("ranges", "match"),
    [
        ([(0, 5), (4, 8)], r"w: .*several slices with elements \[4, 5\)"),
        ([(0, 8), (0, 8)], r"w: .*several slices with elements \[0, 8\)"),
        ([(0, 3), (5, 8)], r"w: .*no slice with elements \[3, 5\)"),
        ([(1, 8)], r"w: .*no slice with elements \[0, 1\)"),
        ([(0, 4), (4, 7)], r"w: .*no slice with elements \[7, 8\)"),
        ([], r"w: .*no slice with elements \[0, 8\)"),
        # As many elements as there should be, yet neither gap nor overlap is harmless.
        ([(0, 5), (3, 6)], r"w: "),
    ],
)
def test_slices_that_are_no_partition_are_refused(ranges, match, shared_path, comm) -> None:
    slices = [
        Slice("w", start, stop, torch.ones(stop - start))
        for i, (start, stop) in enumerate(ranges)
        if i % comm.size == comm.rank
    ]
    refused(shared_path, comm, slices, match)


@pytest.mark.parametrize(
    "bad",
    [
        Slice("v", 0, 8, torch.ones(8)),
        Slice("w", 0, 9, torch.ones(9)),
        Slice("w", 0, 8, torch.ones(7)),
        Slice("w", 0, 8, torch.ones(16)[::2]),
        Slice("w", 0, 8, torch.ones(8, dtype=torch.float16)),
    ],
    ids=["name", "bounds", "numel", "strides", "dtype"],
)
def test_a_slice_that_does_not_fit_is_refused_on_all_ranks(bad, shared_path, comm) -> None:
    refused(shared_path, comm, [bad] if comm.rank == comm.size - 1 else [], bad.name)


def test_dtypes_without_a_name_in_the_format_are_refused(shared_path, comm) -> None:
    table = TensorTable({"w": TensorSpec((2,), torch.complex128)}, [])
    with pytest.raises(CheckpointError, match="complex128"):
        write_checkpoint(shared_path / "c", table, NOTHING, {}, comm)


def test_tables_that_differ_between_ranks_are_refused(shared_path, comm) -> None:
    if comm.size == 1:
        pytest.skip("needs two ranks")
    refused(shared_path, comm, [], "different tensors", numel=8 + comm.rank)


@pytest.mark.parametrize(
    ("value", "match"),
    [
        (torch.ones(2), r"state\.extra\.a\[1\]: .*Tensor"),
        ({3: 4}, r"state\.extra\.a\[1\]: .*3"),
        ({1, 2}, "set"),
    ],
)
def test_a_state_that_is_no_json_is_refused_on_all_ranks(value, match, shared_path, comm) -> None:
    state = {"extra": {"a": [0, value if comm.rank == comm.size - 1 else 1]}}
    with pytest.raises(TypeError, match=match):
        write_checkpoint(shared_path / "c", NOTHING, NOTHING, state, comm)
    comm.Barrier()
    assert list(shared_path.iterdir()) == []


def test_a_state_that_contains_itself_is_refused(shared_path, comm) -> None:
    loop: list[object] = []
    loop.append(loop)
    with pytest.raises(ValueError, match="contains itself"):
        write_checkpoint(shared_path / "c", NOTHING, NOTHING, {"extra": loop}, comm)


# -- agreement ---------------------------------------------------------------------------------


class _LocalError(MismatchError):
    def __init__(self, first: int, second: int) -> None:
        super().__init__(f"{first} is not {second}")


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (CheckpointError("broken"), CheckpointError),
        (MismatchError("broken"), MismatchError),
        (ZerompiError("broken"), ZerompiError),
        (ValueError("broken"), ValueError),
        (KeyError("broken"), ZerompiError),
        (_LocalError(1, 2), MismatchError),
        (OSError(errno.EIO, "broken", "file"), CheckpointError),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_an_error_of_one_rank_is_raised_on_all(error, kind, comm) -> None:
    rank = comm.size - 1
    with pytest.raises(Exception, match=r"broken|1 is not 2") as caught:
        agree_error(comm, error if comm.rank == rank else None)
    if comm.rank == rank and not isinstance(error, OSError):
        assert caught.value is error
    else:
        assert type(caught.value) is kind
        assert str(caught.value).startswith(f"rank {rank}: " if comm.size > 1 else "")
    if isinstance(error, OSError):
        assert "file: broken" in str(caught.value)


def test_no_error_raises_nothing(comm) -> None:
    agree_error(comm, None)
