"""Where a run computes: the choice, and a whole run in the memory of an emulated device."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import zerompi
from harness.memory import HAS_DEVICE, WITHOUT_DEVICE
from zerompi.train import devices
from zerompi.train.config import InputError


@pytest.fixture
def problems(monkeypatch):
    """Let ranks have devices, or say why not; collects which ones were used."""

    def set_up(problem):
        shared = []
        monkeypatch.setattr(devices, "why_not", lambda: problem)
        monkeypatch.setattr(devices, "use_device", lambda comm, *, share: shared.append(share) or 3)
        return shared

    return set_up


def test_auto_takes_devices_where_all_ranks_have_one(comm, problems):
    shared = problems(None)
    assert devices.choose("auto", comm, share=False) == torch.device("cuda", 3)
    assert devices.choose("cuda", comm, share=True) == torch.device("cuda", 3)
    assert devices.choose("cpu", comm, share=False) == torch.device("cpu")
    assert shared == [False, True]


def test_auto_takes_the_host_where_one_rank_has_no_device(comm, problems):
    shared = problems("torch sees none" if comm.rank == comm.size - 1 else None)
    assert devices.choose("auto", comm, share=False) == torch.device("cpu")
    assert shared == []


def test_a_rank_without_a_device_is_refused_on_all(comm, problems):
    problems("torch sees none" if comm.rank == comm.size - 1 else None)
    with pytest.raises(InputError, match=f"none on rank {comm.size - 1}: torch sees none"):
        devices.choose("cuda", comm, share=False)


def test_too_few_devices_are_wrong_input_on_all(comm, problems, monkeypatch):
    problems(None)

    def refuse(comm, *, share):
        raise zerompi.ZerompiError("use_device: expected a device for each rank, got fewer")

    monkeypatch.setattr(devices, "use_device", refuse)
    with pytest.raises(InputError, match="use_device: expected a device for each rank"):
        devices.choose("auto", comm, share=False)


# The parameters lie in device memory that torch, without torch.cuda, takes for the host's.
_EMULATED = """
from zerompi import api, cli, device
from zerompi.memory import HOST, Space
device.use(0)
of_parameters = api._space
api._space = lambda model, wanted=None: (
    of_parameters(model) if wanted is None else Space(HOST.device, is_device=True)
)
held = set()
adopt = api.Zero.__init__
def look(zero, *args):
    adopt(zero, *args)
    held.update(device.holds(s.shard) for u in zero._units for s in u.segments if s.shard.numel())
    assert held == {True}, held
api.Zero.__init__ = look
cli.main()
"""


@pytest.mark.skipif(not HAS_DEVICE, reason=WITHOUT_DEVICE)
def test_a_run_in_device_memory_has_the_losses_of_the_host(
    train: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [key[2] for key in train(2, "host").losses]
    monkeypatch.setenv("CUEMU_PROTECT", "0")
    script = tmp_path / "emulated.py"
    script.write_text(_EMULATED)
    whole = train(2, "device", script=script, save_every=3)
    assert [key[2] for key in whole.losses] == pytest.approx(expected, rel=1e-5)
    checkpoints = whole.out / "checkpoints"
    shutil.rmtree(checkpoints / "step-6")
    resumed = train(2, "device", script=script, save_every=3, resume=True)
    assert f"continuing from {checkpoints / 'step-3'} after step 3" in resumed.job.stdout
    assert [key[2] for key in resumed.losses] == pytest.approx(expected, rel=1e-5)
