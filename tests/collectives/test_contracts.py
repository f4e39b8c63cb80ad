"""Wrong arguments end on every rank, before any data moves, and say what was expected."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from mpi4py import MPI

import zerompi
from harness.memory import HAS_DEVICE, UNDER_TEST, WITHOUT_DEVICE, DeviceMemory
from zerompi.collectives import (
    Group,
    all_gather,
    all_reduce,
    all_to_all,
    broadcast,
    contract,
    reduce_scatter,
)

SAME_SIZE = [all_reduce, all_to_all, broadcast]


def zeros(numel, dtype=torch.float32):
    return UNDER_TEST.put(torch.zeros(numel, dtype=dtype))


def read_only(array):
    array.flags.writeable = False
    return array


def expect(group, call, error, message):
    """`call` raises on every rank, moves nothing, and leaves the group usable."""
    before = group.traffic.snapshot()
    with pytest.raises(error, match=message):
        call()
    assert set(group.traffic.difference(before)) <= {"header"}
    own = UNDER_TEST.put(torch.ones(1))
    all_reduce(own, own, group)
    assert UNDER_TEST.get(own).item() == group.size


@pytest.mark.filterwarnings("ignore:.*quantized tensor:UserWarning")
@pytest.mark.parametrize("operation", SAME_SIZE)
@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda n: [0.0] * n, TypeError, "send: expected a NumPy or CuPy array or .*, got list"),
        (lambda n: torch.zeros(n).double(), TypeError, "recv: expected the dtype of send"),
        (lambda n: torch.zeros(2 * n), ValueError, "recv: expected [0-9]+ elements .*, got [0-9]+"),
        (lambda n: torch.zeros(n, 2)[:, 0], ValueError, "send: expected a contiguous tensor"),
        (lambda n: np.zeros((n, 2), "f")[:, 0], ValueError, "send: expected a C-contiguous array"),
        (lambda n: torch.zeros(n, requires_grad=True), ValueError, "send: .*requires_grad"),
        (lambda n: torch.zeros(n, device="meta"), ValueError, "send: expected .* on cpu or cuda"),
        (lambda n: torch.zeros(n).to_sparse(), ValueError, "send: expected a dense tensor"),
        (lambda n: np.zeros(n, object), TypeError, "send: expected a dtype that torch has"),
        (lambda n: np.zeros(n, "M8[s]"), TypeError, "send: expected a dtype that torch has"),
        (lambda n: np.zeros(n, ">f4"), (TypeError, ValueError), "byte order"),
        (
            lambda n: torch.quantize_per_tensor(torch.zeros(n), 1.0, 0, torch.qint8),
            TypeError,
            "send: expected a plain dtype",
        ),
    ],
    ids=[
        "list", "dtype", "numel", "strided", "strided array", "requires_grad", "meta", "sparse",
        "object", "datetime", "byte order", "quantized",
    ],
)  # fmt: skip
def test_a_wrong_send_is_refused(flat, operation, make, error, message):
    n = 2 * flat.size
    expect(flat, lambda: operation(make(n), torch.zeros(n), flat), error, message)


@pytest.mark.parametrize("operation", SAME_SIZE)
def test_lazy_conjugates_are_refused(flat, operation):
    send = torch.zeros(2 * flat.size, dtype=torch.complex64).conj()
    recv = torch.zeros(2 * flat.size, dtype=torch.complex64)
    expect(flat, lambda: operation(send, recv, flat), ValueError, "send: .*resolve_conj")


@pytest.mark.parametrize("operation", SAME_SIZE)
def test_a_read_only_receive_array_is_refused(flat, operation):
    n = 2 * flat.size
    recv = read_only(np.zeros(n, "f"))
    expect(flat, lambda: operation(np.zeros(n, "f"), recv, flat), ValueError, "recv: .*read-only")


@pytest.mark.parametrize("operation", SAME_SIZE)
def test_overlapping_buffers_are_refused(flat, operation):
    memory = UNDER_TEST.put(torch.zeros(4 * flat.size))
    n = 2 * flat.size
    call = lambda: operation(memory[:n], memory[1 : n + 1], flat)  # noqa: E731
    expect(flat, call, ValueError, "recv: expected memory apart from send, .* overlap")


def test_all_to_all_has_no_in_place_form(flat):
    own = UNDER_TEST.put(torch.zeros(flat.size))
    expect(flat, lambda: all_to_all(own, own, flat), ValueError, "there is no in-place form")


def test_wrong_sizes_of_blocks_are_refused(flat):
    size = flat.size
    wrong = f"expected {2 * size} elements .*, got {2 * size + 1}"
    expect(
        flat,
        lambda: all_gather(zeros(2), zeros(2 * size + 1), flat),
        ValueError,
        f"recv: {wrong}",
    )
    expect(
        flat,
        lambda: reduce_scatter(zeros(2 * size + 1), zeros(2), flat),
        ValueError,
        f"send: {wrong}",
    )


def test_a_send_that_is_another_ranks_block_is_refused(flat):
    if flat.size == 1:
        pytest.skip("needs another rank's block")
    full = UNDER_TEST.put(torch.zeros(flat.size, 3))
    other = full[(flat.rank + 1) % flat.size]
    expect(flat, lambda: all_gather(other, full, flat), ValueError, "overlap")
    expect(flat, lambda: reduce_scatter(full, other, flat), ValueError, "overlap")


def test_all_to_all_refuses_a_size_that_does_not_divide(flat):
    if flat.size == 1:
        pytest.skip("one divides everything")
    n = flat.size + 1
    expect(
        flat,
        lambda: all_to_all(zeros(n), zeros(n), flat),
        ValueError,
        f"send: expected a multiple of {flat.size} elements, got {n}",
    )


@pytest.mark.parametrize("root", [-1, 99, True, 0.0, None])
def test_a_wrong_root_is_refused(flat, root):
    own = UNDER_TEST.put(torch.zeros(2))
    expect(
        flat, lambda: broadcast(own, own, flat, root=root), ValueError, "root: expected a rank from"
    )


@pytest.mark.parametrize("operation", [all_reduce, reduce_scatter])
def test_wrong_reductions_are_refused(flat, operation):
    def call(dtype, op):
        numel = 1 if operation is all_reduce else flat.size
        operation(zeros(numel, dtype), zeros(1, dtype), flat, op=op)

    expect(flat, lambda: call(torch.float32, "max"), ValueError, "op: expected 'sum' or 'mean'")
    expect(flat, lambda: call(torch.int64, "mean"), TypeError, "op: expected 'sum' for torch.int64")
    expect(flat, lambda: call(torch.bool, "mean"), TypeError, "op: expected 'sum' for torch.bool")
    expect(flat, lambda: call(torch.bits8, "sum"), TypeError, "expected one that can be summed")


@pytest.mark.parametrize("group", [None, "world", MPI.COMM_SELF])
def test_what_is_no_group_is_refused(group):
    with pytest.raises(TypeError, match=r"group: expected a zerompi\.collectives\.Group"):
        all_reduce(torch.zeros(1), torch.zeros(1), group)


def test_a_closed_group_is_refused(comm):
    group = Group(comm)
    group.close()
    with pytest.raises(zerompi.ZerompiError, match="this group is closed"):
        all_reduce(torch.zeros(1), torch.zeros(1), group)
    with pytest.raises(zerompi.ZerompiError, match="this group is closed"):
        group.exchange([], [], "nothing")


@pytest.mark.parametrize("operation", SAME_SIZE)
def test_ranks_that_disagree_on_size_all_hear_of_both(flat, operation):
    if flat.size == 1:
        pytest.skip("needs ranks that disagree")
    n = flat.size * (3 if flat.rank == 1 else 2)
    expect(
        flat,
        lambda: operation(zeros(n), zeros(n), flat),
        zerompi.MismatchError,
        f"rank.* 0.*{2 * flat.size} elements.*; rank 1: .*{3 * flat.size} elements",
    )


def test_ranks_that_disagree_on_dtype_op_root_or_operation_all_hear_of_both(flat):
    if flat.size == 1:
        pytest.skip("needs ranks that disagree")
    last = flat.rank == flat.size - 1
    dtype = torch.float64 if last else torch.float32
    own, same = zeros(1, dtype), zeros(1)
    cases = [
        (lambda: all_reduce(own, own, flat), "torch.float32.*torch.float64"),
        (lambda: all_reduce(same, same, flat, op="mean" if last else "sum"), "op="),
        (lambda: broadcast(same, same, flat, root=int(last)), "root=0.*root=1"),
        (lambda: (broadcast if last else all_reduce)(same, same, flat), "all_reduce.*broadcast"),
    ]
    for call, message in cases:
        expect(flat, call, zerompi.MismatchError, f"ranks disagree.*{message}")


def test_a_refusal_on_one_rank_reaches_the_others(flat):
    if flat.size == 1:
        pytest.skip("needs another rank")
    numel = 3 if flat.rank == 0 else 2
    if flat.rank == 0:
        expected = (ValueError, r"recv: expected 3 elements \(as send has\), got 2")
    else:
        expected = (zerompi.MismatchError, "rank 0: refusal of all_reduce: recv: expected 3")
    expect(flat, lambda: all_reduce(zeros(numel), zeros(2), flat), *expected)


def test_an_unforeseen_error_of_a_check_reaches_the_others_too(flat):
    def check():
        if flat.rank == 0:
            raise RuntimeError("out of luck")
        return "a check that passed"

    if flat.rank == 0:
        expected = (RuntimeError, "out of luck")
    else:
        expected = (zerompi.MismatchError, "rank 0: refusal of lottery: out of luck")
    expect(flat, lambda: contract.agreed_signature(flat, "lottery", check), *expected)


@pytest.mark.skipif(not HAS_DEVICE, reason=WITHOUT_DEVICE)
def test_memory_of_two_kinds_is_refused(flat):
    host, on_device = torch.ones(2 * flat.size), DeviceMemory().put(torch.ones(2 * flat.size))
    for send, recv, place in [(host, on_device, "on the host"), (on_device, host, "on a device")]:
        call = lambda: all_to_all(send, recv, flat)  # noqa: B023, E731
        expect(flat, call, ValueError, f"recv: expected memory {place}, as send has")


@pytest.mark.skipif(not HAS_DEVICE, reason=WITHOUT_DEVICE)
def test_ranks_with_memory_of_two_kinds_are_told(flat):
    if flat.size == 1:
        pytest.skip("needs another rank")
    own = torch.ones(2)
    if flat.rank == 0:
        own = DeviceMemory().put(own)
    expect(flat, lambda: all_reduce(own, own, flat), zerompi.MismatchError, "on a device")


@pytest.mark.skipif(not HAS_DEVICE, reason=WITHOUT_DEVICE)
def test_a_strided_device_array_is_refused(flat):
    own = DeviceMemory().put(torch.ones(2 * flat.size, 2))[:, 0]
    expect(flat, lambda: all_reduce(own, own, flat), ValueError, "send: expected a C-contiguous")
