"""Checkpoints that all ranks write to a directory that they share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from mpi4py import MPI
from torch import Tensor

from zerompi.checkpoint import Slice, TensorSpec, TensorTable, WriteOptions, write_checkpoint


def uneven_cuts(numel: int, size: int) -> list[int]:
    """Borders of `size` slices; later ranks own more, and nothing is owned by some of small tensors."""
    total = sum((rank + 1) ** 2 for rank in range(size))
    return [numel * sum((r + 1) ** 2 for r in range(rank)) // total for rank in range(size)] + [
        numel
    ]


def table_of(tensors: Mapping[str, Tensor], rank: int, size: int) -> TensorTable:
    specs = {name: TensorSpec(tuple(t.shape), t.dtype) for name, t in tensors.items()}
    slices = []
    for name, tensor in tensors.items():
        cuts = uneven_cuts(tensor.numel(), size)
        start, stop = cuts[rank], cuts[rank + 1]
        slices.append(Slice(name, start, stop, tensor.reshape(-1)[start:stop]))
    return TensorTable(specs, slices)


@pytest.fixture
def make_table() -> Callable[..., TensorTable]:
    """`make_table(tensors, rank, size)`: all tensors, and this rank's slices of them."""
    return table_of


@pytest.fixture
def save() -> Callable[..., None]:
    """`save(path, tensors, comm, optimizer=..., state=..., ...)` on all ranks of `comm`."""

    def save_tensors(
        path: Path,
        tensors: Mapping[str, Tensor],
        comm: MPI.Intracomm,
        *,
        optimizer: Mapping[str, Tensor] | None = None,
        state: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        write_checkpoint(
            path,
            table_of(tensors, comm.rank, comm.size),
            table_of(optimizer or {}, comm.rank, comm.size),
            dict(state or {}),
            comm,
            WriteOptions(**settings),
        )

    return save_tensors


@pytest.fixture
def shared_path(tmp_path: Path, comm: MPI.Intracomm) -> Path:
    """Rank 0's temporary directory, on all ranks."""
    return comm.bcast(tmp_path, root=0)


@pytest.fixture
def random_tensors() -> Callable[[int], dict[str, Tensor]]:
    """A few tensors of mixed shapes and dtypes, the same on all ranks for the same seed."""

    def tensors(seed: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return {
            "h.0.weight": torch.randn(7, 5, generator=generator),
            "h.0.bias": torch.randn(7, generator=generator),
            "h.1.weight": torch.randn(3, 11, generator=generator).to(torch.bfloat16),
            "mask": torch.randint(0, 2, (13,), generator=generator).bool(),
            "scale": torch.randn((), generator=generator),
        }

    return tensors
