"""Saves that are written while training goes on."""

from __future__ import annotations

import errno
import os
import textwrap
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import zerompi
from models import CASES, build, own_slice
from zerompi.checkpoint import CheckpointError, CheckpointReader
from zerompi.checkpoint.writer import Draft

CASE = CASES["tied"]


@pytest.fixture
def shared(comm, tmp_path) -> Path:
    """Rank 0's temporary directory, on all ranks."""
    return comm.bcast(tmp_path)


@pytest.fixture
def gate(monkeypatch):
    """Holds the threads that write until it is set."""
    event, original = threading.Event(), Draft.write

    def write(self):
        if threading.current_thread() is not threading.main_thread():
            assert event.wait(60)
        return original(self)

    monkeypatch.setattr(Draft, "write", write)
    yield event
    event.set()


def train(comm, model, optimizer, numbers):
    for step in numbers:
        x, y = own_slice(CASE.batch(step), comm.rank, comm.size)
        CASE.loss(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()


def assert_same_files(first: Path, second: Path) -> None:
    for name in ("model", "optimizer"):
        ours, theirs = (load_file(d / f"{name}.safetensors") for d in (first, second))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    with CheckpointReader(first) as ours, CheckpointReader(second) as theirs:
        assert ours.state == theirs.state


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_what_is_written_is_the_state_at_the_call(comm, shared, gate, stage):
    model, optimizer = build(CASE, "two_groups")
    with zerompi.partition(model, optimizer, stage=stage, comm=comm) as zero:
        train(comm, model, optimizer, range(2))
        zero.save(shared / "now", extra={"step": 2})
        before = zero.report().memory.now["buffers"]
        zero.save(shared / "later", extra={"step": 2}, blocking=False)
        assert zero.report().memory.now["buffers"] > before  # the copies
        train(comm, model, optimizer, range(2, 4))
        assert not (shared / "later").exists()
        comm.Barrier()
        gate.set()
        zero.wait_for_save()
        assert_same_files(shared / "later", shared / "now")
        assert zero.load(shared / "later") == {"step": 2}


def test_the_memory_of_the_copies_stays_for_the_next_save(comm, shared):
    model, optimizer = build(CASE)
    with zerompi.partition(model, optimizer, comm=comm) as zero:
        train(comm, model, optimizer, range(1))
        zero.save(shared / "a", blocking=False)
        with_copies = zero.report().memory.now["buffers"]
        train(comm, model, optimizer, range(1, 3))
        zero.save(shared / "b", blocking=False)  # waits for the first
        assert zero.report().memory.now["buffers"] == with_copies
        zero.save(shared / "now")
        assert_same_files(shared / "b", shared / "now")
        copies = zero._checkpoints.background.copies
        assert copies._memory.nbytes > 0
    assert copies._memory.nbytes == 0


def test_it_is_published_at_the_end_of_a_step(comm, shared, gate):
    model, optimizer = build(CASE)
    with zerompi.partition(model, optimizer, comm=comm) as zero:
        zero.save(shared / "step-1", blocking=False)
        train(comm, model, optimizer, range(2))
        assert list(shared.glob("step-*")) == []
        comm.Barrier()
        gate.set()
        for step in range(2, 200):
            train(comm, model, optimizer, [step])
            time.sleep(0.01)
            if comm.bcast((shared / "latest").exists()):
                break
        assert (shared / "latest/state.json").exists()
    assert sorted(p.name for p in shared.iterdir()) == ["latest", "step-1"]


def fail_on_last(comm, monkeypatch):
    """Let the disk be full for the last rank's thread."""
    original = os.pwrite

    def pwrite(*args):
        if comm.rank == comm.size - 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(*args)

    monkeypatch.setattr(os, "pwrite", pwrite)


@pytest.mark.parametrize("call", ["save", "wait_for_save", "load", "close"])
def test_what_goes_wrong_is_raised_by_the_next_call_on_all_ranks(
    comm, shared, monkeypatch, caplog, call
):
    model, optimizer = build(CASE)
    zero = zerompi.partition(model, optimizer, comm=comm)
    zero.save(shared / "a", extra={"old": True})
    with monkeypatch.context() as patch:
        fail_on_last(comm, patch)
        zero.save(shared / "a", blocking=False)
        train(comm, model, optimizer, range(2))
        arguments = [shared / "a"] if call in ("save", "load") else []
        with pytest.raises(CheckpointError, match=os.strerror(errno.ENOSPC)):
            getattr(zero, call)(*arguments)
    if comm.rank == comm.size - 1:
        assert "was not saved in the background" in caplog.text
    comm.Barrier()
    assert [p.name for p in shared.iterdir()] == ["a"]
    with CheckpointReader(shared / "a") as reader:
        assert reader.state["extra"] == {"old": True}
    if call != "close":  # raised once
        zero.save(shared / "a", blocking=False)
    zero.close()
    with CheckpointReader(shared / "a") as reader:
        assert reader.state["extra"] == ({"old": True} if call == "close" else {})


def test_a_save_during_a_save_waits_or_is_refused(comm, shared, gate):
    model, optimizer = build(CASE)
    with zerompi.partition(model, optimizer, comm=comm) as zero:
        zero.save(shared / "a", blocking=False)
        for blocking in (True, False):
            with pytest.raises(zerompi.ZerompiError, match="no save to be going on"):
                zero.save(shared / "b", blocking=blocking, if_pending="refuse")
        gate.set()
        zero.save(shared / "b", blocking=False)
        assert (shared / "a").exists()
    assert (shared / "b").exists()
    comm.Barrier()
    assert sorted(p.name for p in shared.iterdir()) == ["a", "b"]


@pytest.mark.parametrize(
    ("argument", "value"),
    [("if_pending", "overwrite"), ("keep", -1), ("keep", True), ("max_shard_size", 0)],
)
def test_wrong_arguments_are_refused(comm, shared, argument, value):
    model, optimizer = build(CASE)
    with (
        zerompi.partition(model, optimizer, comm=comm) as zero,
        pytest.raises(ValueError, match=f"{argument}: expected .*, got {value!r}"),
    ):
        zero.save(shared / "a", **{argument: value})
    zero.close()


def test_what_is_included_stands_beside_the_tensors(comm, shared):
    model, optimizer = build(CASE)
    if comm.rank == 0:
        (shared / "config.json").write_text("{}")
    with zerompi.partition(model, optimizer, comm=comm) as zero:
        zero.save(shared / "a", include=[shared / "config.json"], max_shard_size=4000)
        assert (shared / "a/config.json").read_text() == "{}"
        assert (shared / "a/model.safetensors.index.json").exists()
        with pytest.raises(CheckpointError, match="absent"):
            zero.save(shared / "b", include=[shared / "absent"])
        zero.load(shared / "a")


END = textwrap.dedent(
    """
    import sys, time
    import torch, zerompi
    from zerompi.checkpoint.writer import Draft

    original = Draft.write
    def slow(self):
        time.sleep(0.5)
        return original(self)
    Draft.write = slow
    if sys.argv[2] == "failing":
        Draft.publish = None
    model = torch.nn.Linear(5, 3)
    zero = zerompi.partition(model, torch.optim.SGD(model.parameters(), lr=0.1))
    zero.save(sys.argv[1], extra={"step": 1}, blocking=False)
    """
)


@pytest.mark.parametrize(("ranks", "level"), [(1, "multiple"), (2, "multiple"), (2, "single")])
def test_the_end_of_the_program_completes_it(tmp_path, run_mpi, ranks, level):
    """Also where only one thread may call MPI."""
    result = run_mpi(
        ranks, ["-c", END, tmp_path / "a", ""], env={"MPI4PY_RC_THREAD_LEVEL": level}, timeout=60
    )
    assert result.returncode == 0, result.output
    with CheckpointReader(tmp_path / "a") as reader:
        assert reader.state["extra"] == {"step": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_program_whose_last_save_fails_ends_with_an_error(tmp_path, run_mpi):
    result = run_mpi(2, ["-c", END, tmp_path / "a", "failing"], timeout=60)
    assert result.returncode != 0
    assert "was not saved in the background" in result.output
    assert list(tmp_path.iterdir()) == []
