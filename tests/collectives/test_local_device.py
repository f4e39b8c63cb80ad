"""One rank, one device: which, and what happens where there are too few."""

from __future__ import annotations

import pytest

import zerompi
from harness.memory import HAS_DEVICE, WITHOUT_DEVICE
from zerompi import device, local_device


@pytest.fixture
def devices(monkeypatch):
    """Let this rank see some devices, told apart by their names; collects which one was used."""

    def see(names, by_launcher=None):
        used = []
        monkeypatch.setattr(device, "count", lambda: len(names))
        monkeypatch.setattr(device, "identity", lambda number: names[number])
        monkeypatch.setattr(device, "use", used.append)
        monkeypatch.setattr(local_device, "local_rank", lambda: by_launcher)
        monkeypatch.delenv("ZEROMPI_SHARE_DEVICES", raising=False)
        return used

    return see


def test_a_rank_takes_the_device_of_its_number_in_the_node(comm, devices):
    used = devices([f"device {i}" for i in range(comm.size)])
    assert zerompi.use_device(comm) == comm.rank
    assert used == [comm.rank]


def test_the_launchers_number_comes_first(comm, devices):
    used = devices([f"device {i}" for i in range(comm.size)], comm.size - 1 - comm.rank)
    zerompi.use_device(comm)
    assert used == [comm.size - 1 - comm.rank]


def test_a_rank_that_sees_one_device_takes_it(comm, devices):
    used = devices([f"device {comm.rank}"], by_launcher=comm.rank)
    zerompi.use_device(comm)
    assert used == [0]


def test_two_ranks_on_one_device_are_refused_on_all(comm, devices):
    used = devices(["the only one"])
    if comm.size == 1:
        pytest.skip("needs another rank")
    with pytest.raises(zerompi.ZerompiError, match="got ranks 0 and 1 on the same one"):
        zerompi.use_device(comm)
    assert used == []


def test_two_ranks_may_share_a_device_where_that_is_wanted(comm, devices, monkeypatch):
    used = devices(["the only one"])
    monkeypatch.setenv("ZEROMPI_SHARE_DEVICES", "1")
    zerompi.use_device(comm)
    assert used == [0]


def test_a_rank_without_a_device_is_refused_on_all(comm, devices):
    used = devices(["device"] if comm.rank else [])
    with pytest.raises(zerompi.ZerompiError, match=r"got none on 1 of \d+, first rank 0"):
        zerompi.use_device(comm)
    assert used == []


@pytest.mark.skipif(not HAS_DEVICE, reason=WITHOUT_DEVICE)
def test_devices_have_identities():
    identities = {device.identity(number) for number in range(device.count())}
    assert len(identities) == device.count()
