"""Writing a checkpoint: all ranks write their own byte ranges of the same files."""

from __future__ import annotations

import os
import shutil
import socket
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from mpi4py import MPI
from torch import Tensor

from zerompi.agreement import agreement
from zerompi.checkpoint.directory import Replacement, tidy_series
from zerompi.checkpoint.disk import allocate, start_writing
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


@dataclass(frozen=True)
class WriteOptions:
    """How a checkpoint is written.

    Attributes:
        max_shard_nbytes: tensors beyond it go into further files, with an index.
        keep: with a path named `step-N`, how many of the newest stay; 0 keeps all.
        include: files that are copied beside the tensors, such as config.json.
    """

    max_shard_nbytes: int = DEFAULT_MAX_SHARD_NBYTES
    keep: int = 0
    include: Sequence[Path] = ()


DEFAULT_OPTIONS = WriteOptions()
_FILES_AT_ONCE = 64


class _File(NamedTuple):
    """A file, and what of it this rank writes."""

    stem: str
    shard: ShardFile
    slices: list[Slice]


class Draft:
    """A checkpoint that is being written beside its final place. Made by `open_draft`.

    Every rank calls `write`, then rank 0 `publish`, or `discard` if a rank has failed. Nothing here
    communicates, so that other threads may do it.

    Attributes:
        path: where it will be.
        num_pieces: rows of the array that `write` returns.
    """

    def __init__(
        self,
        path: Path,
        temporary: Path,
        files: list[_File],
        replacement: Replacement | None,
        options: WriteOptions,
    ) -> None:
        self.path = path
        self._temporary = temporary
        self._files = files
        self._replacement = replacement
        self._options = options
        sizes = [own.values.nbytes for file in files for own in file.slices]
        self.num_pieces = sum(-(-size // PIECE_NBYTES) for size in sizes)

    def write(self) -> np.ndarray:
        """Write this rank's slices, and let go of them.

        Returns:
            Number of the file, begin, end and CRC-32 of each piece; (num_pieces, 4) int64.

        Raises:
            OSError, CheckpointError: naming the file.
        """
        rows: list[tuple[int, int, int, int]] = []
        concerned = [i for i, f in enumerate(self._files) if f.slices or self._replacement]
        for start in range(0, len(concerned), _FILES_AT_ONCE):
            # The disk works on all of them while this waits for the first.
            with ExitStack() as opened:
                for number in concerned[start : start + _FILES_AT_ONCE]:
                    file = self._files[number]
                    stream = opened.enter_context(_opened(self._temporary / file.shard.name))
                    header = file.shard.header.raw if self._replacement is not None else b""
                    rows += [(number, *row) for row in _write_slices(stream, file, header)]
                    file.slices.clear()
        return np.array(rows, dtype=np.int64).reshape(-1, 4)

    def publish(self, state: Mapping[str, Any], rows: Sequence[np.ndarray]) -> None:
        """Complete the directory and move it to its place, on rank 0.

        Args:
            state: for `state.json`.
            rows: what `write` has returned on each rank.

        Raises:
            OSError, CheckpointError: what was at the path is there still.
        """
        assert self._replacement is not None
        _write_indices(self._temporary, self._files)
        pieces = np.concatenate(rows)
        checksums = {
            file.shard.name: build_checksums(file.shard.header, pieces[pieces[:, 0] == i, 1:])
            for i, file in enumerate(self._files)
        }
        for source in self._options.include:
            _copy(source, self._temporary / source.name)
        _write_text(self._temporary / STATE_NAME, state_text(state, len(rows), checksums))
        self._replacement.commit()
        tidy_series(self._replacement.path, self._options.keep)

    def discard(self) -> None:
        """Remove what was written, on rank 0."""
        if self._replacement is not None:
            self._replacement.discard()


def write_checkpoint(
    path: Path,
    model: TensorTable,
    optimizer: TensorTable,
    state: Mapping[str, Any],
    comm: MPI.Intracomm,
    options: WriteOptions = DEFAULT_OPTIONS,
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
        options: the same on all ranks.

    Raises:
        CheckpointError: it could not be written, or the slices of all ranks are not each element once.
        TypeError, ValueError: `state` is no JSON.
            All of them on all ranks; what was at `path` is untouched, and nothing is left behind.
    """
    draft = open_draft(path, model, optimizer, state, comm, options)
    try:
        with agreement(comm):
            rows = draft.write()
        gathered = comm.gather(rows, root=0)
        with agreement(comm):
            if gathered is not None:
                draft.publish(state, gathered)
    except Exception:
        draft.discard()
        raise


def open_draft(
    path: Path,
    model: TensorTable,
    optimizer: TensorTable,
    state: Mapping[str, Any],
    comm: MPI.Intracomm,
    options: WriteOptions,
) -> Draft:
    """Check everything, and create the files with nothing in them; see `write_checkpoint`. Collective."""
    tables = {"model": model, "optimizer": optimizer}
    files: list[_File] = []
    with agreement(comm):
        check_json(state, "state")
        for stem, table in tables.items():
            check_slices(table)
            if table.specs or stem == "model":
                files += _plan(stem, table, options.max_shard_nbytes)
    check_tables(list(tables.values()), comm)
    replacement = None
    with agreement(comm):
        if comm.rank == 0:
            replacement = Replacement(path)
    temporary: Path = comm.bcast(replacement and replacement.temporary, root=0)
    draft = Draft(path, temporary, files, replacement, options)
    try:
        with agreement(comm):
            if comm.rank == 0:
                for file in files:
                    _create(temporary, file.shard)
    except Exception:
        draft.discard()
        raise
    return draft


def _plan(stem: str, table: TensorTable, max_shard_nbytes: int) -> list[_File]:
    files = [_File(stem, shard, []) for shard in plan_files(stem, table.specs, max_shard_nbytes)]
    slices_of = {name: file.slices for file in files for name in file.shard.header.tensors}
    for own in table.slices:
        if own.stop > own.start:
            slices_of[own.name].append(own)
    return files


# -- files -------------------------------------------------------------------------------------


def _create(directory: Path, shard: ShardFile) -> None:
    """A file of full size."""
    with _named_errors(directory / shard.name), open(directory / shard.name, "xb") as stream:
        nbytes = shard.header.nbytes + shard.header.data_nbytes
        allocate(stream.fileno(), nbytes)
        stream.truncate(nbytes)


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    """A descriptor to write with; what was written is on the disk at the end."""
    with _named_errors(path):
        descriptor = _open_shared(path)
        try:
            yield descriptor
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _write_slices(descriptor: int, file: _File, header: bytes) -> list[tuple[int, int, int]]:
    """Write `header` and this rank's slices of one file; return begin, end and CRC-32 of each piece."""
    stored_as, rows = file.shard.header.tensors, []
    _write_all(descriptor, memoryview(header), 0)
    for own in sorted(file.slices, key=lambda own: stored_as[own.name].begin):
        stored = stored_as[own.name]
        begin = stored.begin + own.start * stored.spec.dtype.itemsize
        for raw in _pieces_of(own.values):
            _write_all(descriptor, raw, file.shard.header.nbytes + begin)
            start_writing(descriptor, file.shard.header.nbytes + begin, len(raw))
            rows.append((begin, begin + len(raw), zlib.crc32(raw)))
            begin += len(raw)
    return rows


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


def _copy(source: Path, target: Path) -> None:
    with _named_errors(target):
        shutil.copyfile(source, target)
        descriptor = os.open(target, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


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
