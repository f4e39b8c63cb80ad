"""Writing a checkpoint: all ranks write their own byte ranges of the same files."""

from __future__ import annotations

import os
import socket
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from mpi4py import MPI
from torch import Tensor

from zerompi.agreement import agreement
from zerompi.checkpoint.directory import Replacement
from zerompi.checkpoint.shards import (
    DEFAULT_MAX_SHARD_NBYTES,
    ShardFile,
    index_of,
    index_path,
    plan_files,
)
from zerompi.checkpoint.state_file import (
    PIECE_NBYTES,
    STATE_NAME,
    build_checksums,
    state_text,
)
from zerompi.checkpoint.strict_json import check_json
from zerompi.checkpoint.table import Slice, TensorTable, check_slices, check_tables
from zerompi.errors import CheckpointError


class _File(NamedTuple):
    """A file, and what of it this rank writes."""

    stem: str
    shard: ShardFile
    slices: list[Slice]


def write_checkpoint(
    path: Path,
    model: TensorTable,
    optimizer: TensorTable,
    state: Mapping[str, Any],
    comm: MPI.Intracomm,
    *,
    max_shard_nbytes: int = DEFAULT_MAX_SHARD_NBYTES,
) -> None:
    """Write a checkpoint directory that is complete or absent. Collective.

    `model.safetensors` and `optimizer.safetensors` are written by all ranks, each its own slices;
    `state.json` has rank 0's `state`. An existing checkpoint at `path` is replaced at the end;
    parent directories are created.

    Args:
        path: the final directory, the same on all ranks and on a file system that all share.
        model: weights and buffers.
        optimizer: tensors of the optimizer's state; no file if there are none.
        state: JSON values by name, checked on all ranks.
        comm: the ranks that write.
        max_shard_nbytes: tensors beyond it go into further files, with an index.

    Raises:
        CheckpointError: it could not be written, or the slices of all ranks are not each element once.
        TypeError, ValueError: `state` is no JSON.
            All of them on all ranks; what was at `path` is untouched, and nothing is left behind.
    """
    tables = {"model": model, "optimizer": optimizer}
    files: list[_File] = []
    with agreement(comm):
        check_json(state, "state")
        for stem, table in tables.items():
            check_slices(table)
            if table.specs or stem == "model":
                files += _plan(stem, table, max_shard_nbytes)
    check_tables(list(tables.values()), comm)
    replacement = None
    with agreement(comm):
        if comm.rank == 0:
            replacement = Replacement(path)
    temporary: Path = comm.bcast(replacement and replacement.temporary, root=0)
    try:
        with agreement(comm):
            if comm.rank == 0:
                for file in files:
                    _create(temporary, file.shard)
        with agreement(comm):
            pieces = [_write_slices(temporary, file) for file in files]
        gathered = comm.gather(pieces, root=0)
        with agreement(comm):
            if replacement is not None and gathered is not None:
                _write_indices(temporary, files)
                checksums = [
                    build_checksums(file.shard.header.raw, [of_rank[i] for of_rank in gathered])
                    for i, file in enumerate(files)
                ]
                by_name = {f.shard.name: c for f, c in zip(files, checksums, strict=True)}
                _write_text(temporary / STATE_NAME, state_text(state, comm.size, by_name))
                replacement.commit()
    except Exception:
        if replacement is not None:
            replacement.discard()
        raise


def _plan(stem: str, table: TensorTable, max_shard_nbytes: int) -> list[_File]:
    files = [_File(stem, shard, []) for shard in plan_files(stem, table.specs, max_shard_nbytes)]
    slices_of = {name: file.slices for file in files for name in file.shard.header.tensors}
    for own in table.slices:
        if own.stop > own.start:
            slices_of[own.name].append(own)
    return files


# -- files -------------------------------------------------------------------------------------


def _create(directory: Path, shard: ShardFile) -> None:
    """A file with its header and full size."""
    with _named_errors(directory / shard.name), open(directory / shard.name, "xb") as stream:
        stream.write(shard.header.raw)
        stream.truncate(shard.header.nbytes + shard.header.data_nbytes)
        stream.flush()
        os.fsync(stream.fileno())


def _write_slices(directory: Path, file: _File) -> np.ndarray:
    """Write this rank's slices of one file; return (begin, end, crc32) of each piece, (pieces, 3)."""
    path, header, rows = directory / file.shard.name, file.shard.header, []
    if file.slices:
        with _named_errors(path):
            descriptor = _open_shared(path)
            try:
                for own in sorted(file.slices, key=lambda own: header.tensors[own.name].begin):
                    stored = header.tensors[own.name]
                    begin = stored.begin + own.start * stored.spec.dtype.itemsize
                    for raw in _pieces_of(own.values):
                        _write_all(descriptor, raw, header.nbytes + begin)
                        rows.append((begin, begin + len(raw), zlib.crc32(raw)))
                        begin += len(raw)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
    return np.array(rows, dtype=np.int64).reshape(-1, 3)


def _open_shared(path: Path) -> int:
    try:
        return os.open(path, os.O_WRONLY)
    except FileNotFoundError:
        raise CheckpointError(
            f"{path}: expected the file that rank 0 has created, got nothing on {socket.gethostname()}: "
            "the checkpoint must be on a file system that all ranks share"
        ) from None


def _pieces_of(values: Tensor) -> Iterator[memoryview]:
    """The bytes of `values` on the host, in pieces."""
    numel = PIECE_NBYTES // values.itemsize
    for start in range(0, values.numel(), numel):
        piece = values.detach()[start : start + numel].resolve_conj().resolve_neg().cpu()
        yield piece.view(torch.uint8).numpy().data


def _write_all(descriptor: int, raw: memoryview, offset: int) -> None:
    while raw:
        written = os.pwrite(descriptor, raw, offset)
        raw, offset = raw[written:], offset + written


def _write_text(path: Path, text: str) -> None:
    with _named_errors(path), open(path, "x", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def _write_indices(directory: Path, files: Sequence[_File]) -> None:
    for stem in {file.stem for file in files}:
        shards = [file.shard for file in files if file.stem == stem]
        if len(shards) > 1:
            _write_text(index_path(directory, stem), index_of(shards))


@contextmanager
def _named_errors(path: Path) -> Iterator[None]:
    """Name the file in an OSError that does not."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise
