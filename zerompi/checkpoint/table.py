"""Which tensors a checkpoint has, and which elements of them each rank writes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from math import prod
from typing import NamedTuple

import numpy as np
import torch
from mpi4py import MPI
from torch import Tensor

from zerompi.agreement import agreement
from zerompi.errors import CheckpointError


class TensorSpec(NamedTuple):
    """A whole tensor, without its values."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """Elements of the whole tensor."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return self.numel * self.dtype.itemsize


class Slice(NamedTuple):
    """Elements [start, stop) of the flattened tensor `name`; `values` is 1-D and contiguous."""

    name: str
    start: int
    stop: int
    values: Tensor


class TensorTable(NamedTuple):
    """All tensors, the same on all ranks, and this rank's slices of them."""

    specs: Mapping[str, TensorSpec]
    slices: Sequence[Slice]


def check_slices(table: TensorTable) -> None:
    """Refuse slices that do not fit their tensor. Local.

    Raises:
        CheckpointError: naming the tensor.
    """
    for name, start, stop, values in table.slices:
        spec = table.specs.get(name)
        if spec is None:
            raise CheckpointError(f"{name}: expected a tensor of the table, got an unknown name")
        if not 0 <= start <= stop <= spec.numel:
            raise CheckpointError(
                f"{name}: expected a slice of [0, {spec.numel}), got [{start}, {stop})"
            )
        if values.shape != (stop - start,) or not values.is_contiguous():
            raise CheckpointError(
                f"{name}: expected {stop - start} contiguous values, got shape {tuple(values.shape)} "
                f"with strides {values.stride()}"
            )
        if values.dtype is not spec.dtype:
            raise CheckpointError(f"{name}: expected {spec.dtype}, got values of {values.dtype}")


def check_tables(tables: Sequence[TensorTable], comm: MPI.Intracomm) -> None:
    """Refuse tables that differ between ranks or whose slices are no partition. Collective.

    Every element of every tensor must be in exactly one slice of one rank.

    Raises:
        CheckpointError: on all ranks, naming a tensor.
    """
    names = [(i, name) for i, table in enumerate(tables) for name in sorted(table.specs)]
    listed = repr([(i, name, tables[i].specs[name]) for i, name in names])
    digests = comm.allgather(hashlib.sha256(listed.encode()).digest())
    for rank, digest in enumerate(digests):
        if digest != digests[0]:
            raise CheckpointError(f"ranks 0 and {rank} have different tensors to save")
    position = {key: k for k, key in enumerate(names)}
    rows = [
        (position[i, name], start, stop)
        for i, table in enumerate(tables)
        for name, start, stop, _ in table.slices
        if stop > start
    ]
    gathered = comm.gather(np.array(rows, dtype=np.int64).reshape(-1, 3), root=0)
    with agreement(comm):
        if gathered is not None:
            numels = [tables[i].specs[name].numel for i, name in names]
            _check_coverage([name for _, name in names], numels, np.concatenate(gathered))


def _check_coverage(names: Sequence[str], numels: Sequence[int], rows: np.ndarray) -> None:
    """`rows` is (slices, 3): the tensor's position in `names`, start, stop."""
    rows = rows[np.lexsort((rows[:, 1], rows[:, 0]))]
    ends = [0] * len(names)
    for tensor, start, stop in rows.tolist():
        if start != ends[tensor]:
            found = "several slices" if start < ends[tensor] else "no slice"
            first, last = sorted((start, ends[tensor]))
            raise CheckpointError(
                f"{names[tensor]}: expected each element in one slice, got {found} with elements "
                f"[{first}, {last})"
            )
        ends[tensor] = stop
    for name, end, numel in zip(names, ends, numels, strict=True):
        if end != numel:
            raise CheckpointError(
                f"{name}: expected each element in one slice, got no slice with elements "
                f"[{end}, {numel})"
            )
