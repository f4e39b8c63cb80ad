"""A load takes over everything or nothing, and says what does not fit."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import zerompi
from harness.disks import Disk
from models import CASES, build, own_slice
from zerompi.checkpoint import CheckpointError
from zerompi.generators import generator_states, prepare_states, states_of_rank
from zerompi.restore import take_states

CASE = CASES["tied"]


@pytest.fixture
def shared(comm, tmp_path) -> Path:
    """Rank 0's temporary directory, on all ranks."""
    return comm.bcast(tmp_path)


def train(comm, model, optimizer, numbers=range(2)):
    for step in numbers:
        x, y = own_slice(CASE.batch(step), comm.rank, comm.size)
        CASE.loss(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()


def everything(zero, optimizer) -> list[torch.Tensor]:
    """Copies of this rank's weights and states."""
    states = [v for group in optimizer.param_groups for p in group["params"]
              for _, v in sorted(optimizer.state[p].items())]  # fmt: skip
    return [t.clone() for t in (*zero.full_state_dict().values(), *states)]


def flip(path: Path, position: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[position] ^= 4
    path.write_bytes(raw)


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize(
    "damage", ["model", "optimizer", "state", "cut", "missing file", "another model"]
)
def test_a_load_that_fails_leaves_everything_as_it_was(comm, shared, stage, damage):
    other, other_optimizer = build(CASES["mlp" if damage == "another model" else "tied"], seed=5)
    with zerompi.partition(other, other_optimizer, comm=comm) as zero:
        if damage != "another model":
            train(comm, other, other_optimizer)
        zero.save(shared / "a", max_shard_size=5000)
    if comm.rank == 0:
        last = {
            stem: sorted((shared / "a").glob(f"{stem}-*"))[-1:] for stem in ("model", "optimizer")
        }
        if damage in last:
            flip(last[damage][0], -1)
        elif damage == "state":
            flip(shared / "a/state.json", 40)
        elif damage == "cut":
            os.truncate(last["optimizer"][0], last["optimizer"][0].stat().st_size - 1)
        elif damage == "missing file":
            last["model"][0].unlink()
    comm.Barrier()
    model, optimizer = build(CASE)
    with zerompi.partition(model, optimizer, stage=stage, comm=comm) as zero:
        train(comm, model, optimizer, range(3))
        before, rng = everything(zero, optimizer), generator_states()
        with pytest.raises(zerompi.ZerompiError) as caught:
            zero.load(shared / "a")
        if damage in ("another model", "state"):
            assert len(set(comm.allgather(str(caught.value).removeprefix("rank 0: ")))) == 1
        assert all(map(torch.equal, everything(zero, optimizer), before))
        assert generator_states() == rng
        train(comm, model, optimizer, [3])


def test_not_strict_loads_what_fits_and_tells_the_rest(comm, shared):
    case = CASES["gpt"]
    model, optimizer = build(case)
    with zerompi.partition(model, optimizer, comm=comm) as zero:
        train(comm, model, optimizer)
        zero.save(shared / "a", extra={"step": 2})
        saved = zero.full_state_dict()
    model, optimizer = build(case, seed=99)
    model.head = torch.nn.Linear(20, 7, bias=False)
    model.extra = torch.nn.Parameter(torch.full((2,), 3.0))
    del model.position
    model.register_parameter("position", None)
    optimizer = torch.optim.AdamW(model.parameters())
    with zerompi.partition(model, optimizer, comm=comm) as zero:
        with pytest.raises(
            zerompi.ZerompiError, match="missing: extra; unexpected: position; head"
        ):
            zero.load(shared / "a")
        assert zero.skipped == []
        assert zero.load(shared / "a", strict=False) == {"step": 2}
        now = zero.full_state_dict()
        for name, value in saved.items():
            if name not in ("head.weight", "position"):
                assert torch.equal(now[name], value)
        assert torch.equal(now["extra"], torch.full((2,), 3.0))
        told = "; ".join(zero.skipped)
        for part in ("missing: extra", "unexpected: position", "head.weight: expected shape (7, 20)",
                     "missing: extra", "exp_avg.head.weight: expected shape (7, 20)"):  # fmt: skip
            assert part in told
        pieces = optimizer.param_groups[0]["params"]
        with_state = [piece for piece in pieces if optimizer.state.get(piece)]
        assert len(with_state) == len(pieces) - 2


def test_another_optimizer_is_refused_by_name(comm, shared):
    model, optimizer = build(CASE, "sgd")
    with zerompi.partition(model, optimizer, comm=comm) as zero:
        zero.save(shared / "a")
        weights = zero.full_state_dict()
    model, optimizer = build(CASE, seed=9)
    with zerompi.partition(model, optimizer, comm=comm) as zero:
        lr = optimizer.param_groups[0]["lr"]
        with pytest.raises(zerompi.ZerompiError, match="optimizer is SGD, this one AdamW"):
            zero.load(shared / "a")
        zero.load(shared / "a", strict=False)
        now = zero.full_state_dict()
        assert all(torch.equal(now[name], weights[name]) for name in weights)
        assert optimizer.param_groups[0]["lr"] == lr
        train(comm, model, optimizer)


@pytest.mark.parametrize(("saved", "own"), [(None, True), (True, None)])
def test_the_kernel_of_the_step_is_not_the_checkpoints(comm, shared, saved, own):
    """It may have been written where the parameters were on another device."""

    def make(fused):
        model, optimizer = build(CASE)
        for group in optimizer.param_groups:
            group["fused"] = fused
        return model, optimizer

    model, optimizer = make(saved)
    with zerompi.partition(model, optimizer, comm=comm) as zero:
        optimizer.param_groups[0]["lr"] = 0.25
        train(comm, model, optimizer)
        zero.save(shared / "a")
    model, optimizer = make(own)
    with zerompi.partition(model, optimizer, comm=comm) as zero:
        zero.load(shared / "a")
        assert [group["fused"] for group in optimizer.param_groups] == [own]
        assert optimizer.param_groups[0]["lr"] == 0.25
        train(comm, model, optimizer)


@pytest.mark.parametrize("settings", [{}, {"fused": True}, {"capturable": True}])
def test_states_are_loaded_where_torch_keeps_them(settings):
    piece = torch.nn.Parameter(torch.empty(3, device="meta"))  # stands for another device
    optimizer = torch.optim.AdamW([piece])
    optimizer.param_groups[0].update(settings)
    states = {"step": torch.tensor(2.0), "exp_avg": torch.ones(3), "other": 5}
    take_states(optimizer, {piece: states})
    taken = optimizer.state[piece]
    assert taken["exp_avg"].is_meta
    assert taken["step"].is_meta == bool(settings)
    assert taken["other"] == 5


def test_a_checkpoint_without_its_state_file_is_refused(comm, shared):
    model, optimizer = build(CASE)
    with zerompi.partition(model, optimizer, comm=comm) as zero:
        train(comm, model, optimizer)
        zero.save(shared / "a")
        if comm.rank == 0:
            (shared / "a/state.json").unlink()
        comm.Barrier()
        with pytest.raises(CheckpointError, match=r"state\.json: expected a file"):
            zero.load(shared / "a")
        comm.Barrier()
        if comm.rank == 0:
            (shared / "a/optimizer.safetensors").unlink()
        comm.Barrier()
        assert zero.load(shared / "a") == {}  # weights alone


def test_a_saved_run_goes_on_in_plain_torch(comm, shared):
    """Weights and optimizer states under their names, and what transformers and others take."""
    model, optimizer = build(CASE)
    with zerompi.partition(model, optimizer, comm=comm) as zero:
        train(comm, model, optimizer)
        zero.save(shared / "a")
        train(comm, model, optimizer, [2])
        expected = zero.full_state_dict()
    model, optimizer = build(CASE, seed=9)
    model.load_state_dict(load_file(shared / "a/model.safetensors"), strict=False)  # tied once
    states: dict[str, dict[str, torch.Tensor]] = {}
    for full_name, value in load_file(shared / "a/optimizer.safetensors").items():
        key, _, name = full_name.partition(".")
        states.setdefault(name, {})[key] = value
    for name, parameter in model.named_parameters():
        optimizer.state[parameter] = states[name]
    x, y = CASE.batch(2)
    CASE.loss(model(x), y).backward()
    optimizer.step()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6)


# -- disks -------------------------------------------------------------------------------------


@pytest.fixture
def disk(comm, shared):
    """A small file system of this test, on all ranks: its path, and `remount(options)`."""
    mounted = Disk.mount(shared / "disk", "size=300k") if comm.rank == 0 else None
    if not comm.bcast(mounted is not None):
        pytest.skip("cannot mount a small file system")

    def remount(options):
        comm.Barrier()
        if mounted is not None:
            mounted.remount(options)
        comm.Barrier()

    yield shared / "disk", remount
    comm.Barrier()
    if mounted is not None:
        mounted.unmount()


def contents(comm, directory) -> dict[str, bytes | Path]:
    """Every file and link below `directory`."""
    comm.Barrier()
    return {
        str(path.relative_to(directory)): path.readlink()
        if path.is_symlink()
        else path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


@pytest.mark.parametrize("blocking", [True, False])
@pytest.mark.parametrize("target", ["step-2", "step-1"])
def test_a_full_disk_is_one_error_on_every_rank(comm, disk, blocking, target):
    path, remount = disk
    model, optimizer = build(CASE)
    with zerompi.partition(model, optimizer, comm=comm) as zero:
        zero.save(path / "step-1")  # without states it fits
        before, weights = contents(comm, path), zero.full_state_dict()
        train(comm, model, optimizer)
        with pytest.raises(CheckpointError, match=rf"/\.{target}\S+: {os.strerror(errno.ENOSPC)}"):
            zero.save(path / target, blocking=blocking, keep=1)
            zero.wait_for_save()
        assert contents(comm, path) == before
        remount("size=8m")
        zero.save(path / "step-3", blocking=blocking)
        zero.load(path / "step-1")
        assert all(map(torch.equal, zero.full_state_dict().values(), weights.values()))


@pytest.mark.parametrize("blocking", [True, False])
@pytest.mark.parametrize("target", ["step-2", "step-1", "new/step-2"])
def test_a_read_only_directory_is_one_error_on_every_rank(comm, disk, blocking, target):
    path, remount = disk
    model, optimizer = build(CASE)
    with zerompi.partition(model, optimizer, comm=comm) as zero:
        zero.save(path / "step-1", extra={"step": 1})
        before = contents(comm, path)
        remount("ro")
        train(comm, model, optimizer)
        with pytest.raises(CheckpointError, match=os.strerror(errno.EROFS)) as caught:
            zero.save(path / target, blocking=blocking, keep=1)
            zero.wait_for_save()
        assert len(set(comm.allgather(str(caught.value)))) == 1
        assert contents(comm, path) == before
        assert zero.load(path / "latest") == {"step": 1}


def test_a_directory_that_cannot_be_made_is_one_error_on_every_rank(comm, shared, monkeypatch):
    """As in a directory without the right to write, which root has everywhere but on read-only disks."""

    def refuse(self, *args, **kwargs):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

    model, optimizer = build(CASE)
    with zerompi.partition(model, optimizer, comm=comm) as zero:
        for blocking in (True, False):
            with monkeypatch.context() as patch:
                patch.setattr(Path, "mkdir", refuse)
                with pytest.raises(CheckpointError, match=os.strerror(errno.EACCES)):
                    zero.save(shared / "a", blocking=blocking)
    assert list(shared.iterdir()) == []


# -- random numbers ----------------------------------------------------------------------------


def drawn(state) -> tuple[float, float, float]:
    """What the generators give in this state."""
    for install in prepare_states(state):
        install()
    return float(torch.rand(())), float(np.random.rand()), random.random()


def test_random_streams_go_on_at_another_number_of_ranks():
    saved = []
    for rank in range(4):
        torch.manual_seed(rank)
        np.random.seed(7)  # the same on all ranks
        saved.append(generator_states())
    expected = [drawn(state) for state in saved]
    for size in (1, 2, 4, 6):
        found = [drawn(states_of_rank(saved, rank, size)) for rank in range(size)]
        assert [f[0] for f in found[:4]] == [e[0] for e in expected[:size]]
        assert len({f[0] for f in found}) == size  # each its own
        assert {f[1] for f in found} == {expected[0][1]}
        assert found == [drawn(states_of_rank(saved, rank, size)) for rank in range(size)]


@pytest.mark.parametrize("kind", ["torch", "numpy", "python", "other"])
@pytest.mark.parametrize(
    "state", [None, "", "AAAA", [1, 2], [3, [5], None], ["MT19937", "AA==", 1, 0, 0]]
)
def test_states_that_are_none_are_refused(kind, state):
    with pytest.raises(ValueError, match="rng: expected states of generators"):
        prepare_states({kind: state})
