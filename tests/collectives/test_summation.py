"""Which sums of 16-bit floats are compiled, and what holds where they are not."""

from __future__ import annotations

import logging
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from unittest import mock

import pytest
import torch
from mpi4py import MPI

from collectives.samples import as_bytes, documented_sum, numbers, plain_sum
from zerompi.collectives import all_reduce, summation
from zerompi.kernels import summation_on_host

DTYPES = [torch.bfloat16, torch.float16]
# For tests that do not ask how: compiled once, not anew on each layout.
compiled_once = cache(summation.compiled_sum.__wrapped__)
BROKEN = {
    "does not import": "raise ImportError('Numba needs NumPy 2.9 or less')",
    "does not compile": "njit = lambda function: function\ntypes = config = None",
}


@pytest.fixture(autouse=True)
def nothing_compiled_yet():
    """Each test starts anew, on one thread, and leaves nothing compiled with its own Numba."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    summation.compiled_sum.cache_clear()
    yield
    summation.compiled_sum.cache_clear()
    torch.set_num_threads(threads)


def sums(dtype):
    """A sum that depends on the order and on the accumulator, and what it must be; bytes."""
    summands = [numbers(dtype, 3000, rank) for rank in range(3)]
    out = torch.empty_like(summands[0])
    summation.sum_in_order(summands, out, 1 / 3)
    return as_bytes(out), as_bytes(plain_sum(summands, 1 / 3))


def said(caplog):
    return [record for record in caplog.records if record.name == "zerompi"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_with_numba_the_sum_is_compiled(dtype, caplog):
    pytest.importorskip("numba", reason="needs Numba")
    with mock.patch.object(summation, "_sum_through_accumulator") as by_torch:
        actual, expected = sums(dtype)
    if said(caplog) and "no instructions" in caplog.text:
        pytest.skip(caplog.text)
    assert actual == expected
    by_torch.assert_not_called()
    assert not said(caplog)


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_numba_the_bits_are_the_same_and_nothing_is_said(dtype, monkeypatch, caplog):
    monkeypatch.setattr(summation_on_host, "is_installed", lambda: False)
    monkeypatch.setattr(summation_on_host, "SumOnHost", None)
    with caplog.at_level(logging.DEBUG, "zerompi"):
        actual, expected = sums(dtype)
    assert actual == expected
    assert not said(caplog)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("text", BROKEN.values(), ids=BROKEN)
def test_with_a_broken_numba_the_bits_are_the_same_and_one_warning_says_so(
    dtype, text, tmp_path, monkeypatch, caplog
):
    (tmp_path / "numba.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    with mock.patch.dict(sys.modules), caplog.at_level(logging.DEBUG, "zerompi"):
        for name in [name for name in sys.modules if name.split(".")[0] == "numba"]:
            del sys.modules[name]
        results = [sums(dtype) for _ in range(2)]
    assert all(actual == expected for actual, expected in results)
    [record] = said(caplog)
    assert record.getMessage().startswith(f"sums of {dtype} are not compiled, so slower: ")
    assert (record.levelno == logging.WARNING) == (MPI.COMM_WORLD.rank == 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("threads", "is_compiled"), [(1, True), (3, True), (4, False)])
def test_many_threads_of_torch_are_faster_than_one_of_ours(
    dtype, threads, is_compiled, monkeypatch
):
    asked = mock.Mock(return_value=None)
    monkeypatch.setattr(summation, "compiled_sum", asked)
    torch.set_num_threads(threads)
    actual, expected = sums(dtype)
    assert actual == expected
    assert asked.called == is_compiled


def test_threads_that_need_the_first_sums_at_once_get_them():
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(sums, DTYPES * 2, timeout=120))
    assert all(actual == expected for actual, expected in results)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ranks_with_and_without_numba_give_the_same_bits(group, dtype, monkeypatch):
    has_numba = group.rank % 2 == 0
    monkeypatch.setattr(
        summation, "compiled_sum", lambda dtype: compiled_once(dtype) if has_numba else None
    )
    send = [numbers(dtype, 3000, rank) for rank in range(group.size)]
    recv = torch.empty(3000, dtype=dtype)
    all_reduce(send[group.rank], recv, group, op="mean")
    assert as_bytes(recv) == as_bytes(documented_sum(send, group, 1 / group.size))
