"""How buffers on devices are sent: the choice, messages in pieces, IPC without messages, streams."""

from __future__ import annotations

import logging
import threading
import time
from types import SimpleNamespace

import pytest
import torch

import zerompi
from collectives.conftest import Groups
from collectives.samples import documented_sum, numbers
from harness.memory import HAS_DEVICE, IS_DEFERRED, WITHOUT_DEVICE, DeviceMemory, synchronise
from zerompi import cuda_aware, device
from zerompi.collectives import Group, all_gather, all_reduce, all_to_all, broadcast
from zerompi.collectives import transport as transports
from zerompi.collectives.node import DeviceNode
from zerompi.collectives.transport import CudaAware, Staged
from zerompi.comm_thread import CommThread
from zerompi.cuda_aware import Answer
from zerompi.memory import DeviceArray, Reader

pytestmark = pytest.mark.skipif(not HAS_DEVICE, reason=WITHOUT_DEVICE)

put, get = DeviceMemory().put, DeviceMemory().get


@pytest.fixture
def groups(comm):
    """A group chooses its transport once: new ones for each test."""
    made = Groups(comm)
    yield made
    made.close()


def forced(monkeypatch, value):
    monkeypatch.setenv("ZEROMPI_DEVICE_TRANSPORT", value)


def answering(monkeypatch, *, is_aware):
    """The library says that it can, or cannot, read memory of devices."""
    monkeypatch.delenv("ZEROMPI_DEVICE_TRANSPORT", raising=False)
    monkeypatch.setattr(cuda_aware, "detect", lambda: Answer(is_aware, "the library says so"))


# -- the choice --------------------------------------------------------------------------------


def test_a_library_that_can_gets_device_addresses(flat, monkeypatch):
    answering(monkeypatch, is_aware=True)
    put(torch.ones(1))
    assert flat.transport()[:2] == ("cuda-aware", "the library says so")


def test_ranks_of_one_node_map_each_others_memory_where_the_library_cannot(comm, monkeypatch):
    answering(monkeypatch, is_aware=False)
    put(torch.ones(1))
    group = Group(comm)
    assert group.transport().name == ("staged" if group.node is None else "ipc")
    group.close()


def test_memory_that_cannot_be_mapped_goes_through_the_host(comm, monkeypatch):
    answering(monkeypatch, is_aware=False)
    group = Group(comm)
    if group.node is None:
        group.close()
        pytest.skip("needs ranks that share a node")
    put(torch.ones(1))
    if comm.rank == comm.size - 1:
        monkeypatch.setattr(device, "Mapped", _fail)
    chosen = group.transport()
    assert (chosen.name, chosen.node) == ("staged", None)
    assert "CUDA IPC does not work: no way" in chosen.reason
    group.close()


def test_ipc_that_is_asked_for_and_does_not_work_ends_on_all(comm, monkeypatch):
    forced(monkeypatch, "ipc")
    group = Group(comm)
    if group.node is None:
        group.close()
        pytest.skip("needs ranks that share a node")
    put(torch.ones(1))
    if comm.rank == 0:
        monkeypatch.setattr(device, "Exported", _fail)
    with pytest.raises(zerompi.ZerompiError, match="got 'ipc': no way"):
        group.transport()
    group.close()


def _fail(*args):
    raise RuntimeError("no way")


def test_a_wrong_transport_ends_on_all(flat, monkeypatch):
    forced(monkeypatch, "pigeon")
    with pytest.raises(zerompi.ZerompiError, match="expected one of cuda-aware, .*, got 'pigeon'"):
        all_reduce(own := put(torch.ones(3)), own, flat)


def test_ranks_that_want_different_transports_are_told(flat, monkeypatch):
    if flat.size == 1:
        pytest.skip("needs another rank")
    forced(monkeypatch, "staged" if flat.rank else "cuda-aware")
    with pytest.raises(zerompi.MismatchError, match="ZEROMPI_DEVICE_TRANSPORT: expected the same"):
        all_reduce(own := put(torch.ones(3)), own, flat)


def test_the_choice_is_logged_once_on_rank_0(comm, monkeypatch, caplog):
    answering(monkeypatch, is_aware=True)
    monkeypatch.setattr(transports, "_said", set())
    put(torch.ones(1))
    with caplog.at_level(logging.INFO, "zerompi"):
        for _ in range(2):
            group = Group(comm)
            group.transport()
            group.close()
    texts = [record.getMessage() for record in caplog.records if record.name == "zerompi"]
    said = ["buffers on devices go by transport cuda-aware: the library says so"]
    assert texts == (said if comm.rank == 0 else [])


# -- messages ----------------------------------------------------------------------------------


def test_messages_in_many_pieces_arrive(group, monkeypatch):
    forced(monkeypatch, "staged")
    monkeypatch.setattr(transports, "_SLOT_NBYTES", 64)
    values = [numbers(torch.float32, 1001 * group.size, rank) for rank in range(group.size)]
    own = put(values[group.rank])
    recv = put(torch.zeros(1001 * group.size))
    for _ in range(2):
        all_to_all(own, recv, group)
    block = slice(1001 * group.rank, 1001 * (group.rank + 1))
    assert torch.equal(get(recv), torch.cat([sent[block] for sent in values]))
    all_reduce(own, own, group)
    assert torch.equal(get(own), documented_sum(values, group))
    broadcast(own, own, group, root=group.size - 1)
    assert torch.equal(get(own), documented_sum(values, group))


def test_ipc_sends_no_message_inside_a_node(comm, monkeypatch):
    forced(monkeypatch, "ipc")
    group = Group(comm)
    if group.node is None:
        group.close()
        pytest.skip("needs ranks that share a node")
    monkeypatch.setattr(Staged, "start_exchange", _fail)
    monkeypatch.setattr(CudaAware, "start_exchange", _fail)
    values = [numbers(torch.float32, 3000, rank) for rank in range(group.size)]
    own = put(values[group.rank])
    recv = put(torch.zeros(3000 * group.size))
    for _ in range(3):
        all_gather(own, recv, group)
    assert torch.equal(get(recv), torch.cat(values))
    all_reduce(own, own, group)
    assert torch.equal(get(own), documented_sum(values, group))
    group.close()


@pytest.fixture
def device_node(comm):
    """Staging memory of all ranks, as long as each wants; `close` is the test's."""
    group = Group(comm)
    if group.node is None:
        group.close()
        pytest.skip("needs ranks that share a node")
    put(torch.ones(1))
    yield DeviceNode(group.node.comm, group.node.fence, 64)
    group.close()


def test_mapped_memory_is_read_before_it_is_unmapped(device_node, monkeypatch):
    import cupy

    target = device.from_array("target", cupy.empty(64, "u1"))
    with device.ordered([target]):
        device.copy(target, device_node.rows(0, 1, 64)[device_node.comm.rank - 1][0])
    was_done, close = [], device.Mapped.close

    def noted(mapped):
        was_done.append(device.lane().stream.done)
        close(mapped)

    monkeypatch.setattr(device.Mapped, "close", noted)
    device_node.close()
    assert was_done == [True] * (device_node.comm.size - 1)


def test_memory_stays_until_nobody_maps_it_any_more(device_node, monkeypatch):
    comm, close = device_node.comm, device.Mapped.close

    def late(mapped):
        time.sleep(0.2 * (comm.rank == 0))
        close(mapped)

    monkeypatch.setattr(device.Mapped, "close", late)
    monkeypatch.setattr(device_node, "_unmap", unmap := Timed(device_node._unmap))
    device_node.close()
    closed = time.monotonic()
    assert closed >= max(comm.allgather(unmap.ended))


class Timed:
    """A function that knows when it ended."""

    def __init__(self, function):
        self._function, self.ended = function, 0.0

    def __call__(self):
        self._function()
        self.ended = time.monotonic()


# -- streams -----------------------------------------------------------------------------------


def test_a_collective_comes_after_what_its_stream_was_given_and_before_what_it_is_given_next(group):
    import cupy

    with cupy.cuda.Stream(non_blocking=True) as stream:
        own = cupy.full(5, group.rank + 1, dtype=cupy.float32)
        own *= 2
        total = cupy.empty_like(own)
        all_reduce(own, total, group)
        own.fill(-1)  # only after it has been read
        doubled = total * 2
        stream.synchronize()
    synchronise()
    assert doubled.get().tolist() == [2.0 * group.size * (group.size + 1)] * 5


@pytest.mark.parametrize("kind", ["array", "tensor"])
def test_the_communication_thread_is_ordered_with_the_streams_of_those_who_wait_for_it(flat, kind):
    """Also where nobody computes on the default stream, which is the current one of a new thread."""
    import cupy

    thread, total = CommThread(is_wanted=True), flat.size * (flat.size + 1) // 2
    if not thread.overlaps:
        pytest.skip("no thread")
    streams = []
    with cupy.cuda.Stream(non_blocking=True) as stream:
        own = DeviceMemory().put_tensor(torch.full((5,), 7.0))
        array = device.as_cupy(own)
        array.fill(flat.rank + 1)
        buffer = array if kind == "array" else own

        def work():
            streams.append(cupy.cuda.get_current_stream())
            all_reduce(buffer, buffer, flat)
            array[:] = array * 2

        thread.submit(work).wait()
        doubled = array.copy()
        stream.synchronize()
    thread.close()
    assert doubled.get().tolist() == [2.0 * total] * 5
    assert streams[0].ptr not in (cupy.cuda.Stream.null.ptr, stream.ptr)


@pytest.mark.skipif(not IS_DEFERRED, reason="needs an emulated device with deferred streams")
def test_tensors_of_torch_cuda_are_ordered_with_its_stream_alone(monkeypatch):
    """CuPy's current stream has no part in it."""
    import cupy

    put(torch.ones(1))
    of_torch, of_cupy = (cupy.cuda.Stream(non_blocking=True) for _ in range(2))
    current = SimpleNamespace(cuda_stream=of_torch.ptr)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: current)
    with of_torch:
        source, target = cupy.full(5, 3, "f4"), cupy.empty(5, "f4")
    flats = [
        DeviceArray(array.data.ptr, array.size, torch.float32, array, Reader.TORCH)
        for array in (target, source)
    ]
    with of_cupy:
        cupy.full(5, 1)
        given = of_cupy.record()
        with device.ordered(flats):
            device.copy(*flats)
        device.ready()
    assert target.get(stream=of_torch).tolist() == [3] * 5  # copied after it was filled
    assert not given.done

    with of_cupy, device.ordered(flats):
        device.copy(*flats)
    of_cupy.synchronize()
    assert not device.lane().stream.done
    of_torch.synchronize()
    assert device.lane().stream.done


def test_what_is_sent_may_be_written_again_at_once(group):
    own = put(numbers(torch.float32, 4, group.rank))
    recv = put(torch.zeros(4 * group.size))
    all_gather(own, recv, group)
    own.fill(-1)
    values = [numbers(torch.float32, 4, rank) for rank in range(group.size)]
    assert torch.equal(get(recv), torch.cat(values))


def test_another_thread_communicates_on_the_same_device(flat):
    if device.count() < 2:
        pytest.skip("needs two devices")
    import cupy

    device.use(1)
    try:
        numbers_of = []

        def work():
            own = DeviceMemory().put_tensor(torch.ones(3))
            all_reduce(own, own, flat)
            numbers_of.append(device.as_cupy(own).device.id)
            numbers_of.append(cupy.cuda.Device().id)

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert numbers_of == [1, 1]
    finally:
        device.use(0)
