"""Compiles kernels when they are first used, and launches them; makes arrays for them."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from zerompi.device.driver import cupy

THREADS = 256  # of a block of every kernel
# Kernels stride over what they are given; more blocks than this would keep no device busier.
MOST_BLOCKS = 1 << 14

# Every operation is IEEE's, so that NumPy gives the same bits: no product is fused with a sum, and
# nothing is flushed to zero. CuPy's own raw modules always flush.
OPTIONS = (
    "--std=c++17",
    "--fmad=false",
    "--ftz=false",
    "--prec-div=true",
    "--prec-sqrt=true",
)


def launch(source: str, name: str, blocks: int, *arguments: Any) -> None:
    """Launch a kernel on CuPy's current device and stream.

    Args:
        source: CUDA C++ that defines it with C linkage.
        name: of the kernel.
        blocks: how many blocks of `THREADS` threads there is work for; none: nothing happens.
        arguments: CuPy arrays and NumPy scalars of the kernel's own types.
    """
    if blocks:
        kernel = _kernel(source, name, cupy().cuda.Device().id)
        kernel((min(blocks, MOST_BLOCKS),), (THREADS,), arguments)


def empty(numel: int, dtype: Any) -> Any:
    """A new device array."""
    return cupy().empty(numel, dtype)


def to_device(numbers: Sequence[int]) -> Any:
    """A device array of 64-bit integers."""
    return cupy().asarray(np.array(numbers, np.int64))


def addresses(arrays: Iterable[Any]) -> list[int]:
    """Where device arrays begin."""
    return [array.data.ptr for array in arrays]


@functools.cache
def _kernel(source: str, name: str, device: int) -> Any:
    return _module(source, device).get_function(name)


@functools.cache
def _module(source: str, device: int) -> Any:
    """The module of a source in the context of the current device, which is `device`."""
    cuda = cupy().cuda
    binary, _ = cuda.compiler.compile_using_nvrtc(source, OPTIONS, filename="kernels.cu")
    module = cuda.function.Module()
    module.load(binary)
    return module
