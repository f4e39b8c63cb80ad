"""Reading any part of a checkpoint, or of the weights in a Hugging Face directory."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from zerompi.checkpoint.safetensors_file import Header, StoredTensor, read_header
from zerompi.checkpoint.shards import find_files, index_path
from zerompi.checkpoint.state_file import (
    PIECE_NBYTES,
    STATE_NAME,
    FileChecksums,
    parse_checksums,
    read_state,
)
from zerompi.checkpoint.table import TensorSpec
from zerompi.errors import CheckpointError


class _OpenFile(NamedTuple):
    path: Path
    descriptor: int
    header: Header
    checksums: FileChecksums | None


class _Place(NamedTuple):
    """Where a tensor stands."""

    file: _OpenFile
    tensor: StoredTensor


class CheckpointReader:
    """A checkpoint directory, or a Hugging Face directory with safetensors files, opened for reading.

    Not collective. Opening reads the headers only; what has checksums is verified as it is read.

    `names` gives the name under which a stored weight or buffer is to be known; None leaves it out.

    Attributes:
        model_specs: weights and buffers by name.
        optimizer_specs: tensors of the optimizer's state by name; empty where there are none.
        state: the content of `state.json`; empty for a Hugging Face directory.

    Raises:
        CheckpointError: nothing readable is there, or it is damaged, cut off or of a newer format; or
            two tensors would have one name.
    """

    model_specs: dict[str, TensorSpec]
    optimizer_specs: dict[str, TensorSpec]
    state: dict[str, Any]

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        names: Callable[[str], str | None] | None = None,
    ) -> None:
        self.path = Path(path)
        with ExitStack() as stack:
            try:
                self.state = _read_state(self.path)
                self._model = _open_files(self.path, "model", self.state, stack)
                if not self.state:
                    _refuse_incomplete(self.path, has_model=bool(self._model))
                if names is not None:
                    self._model = _renamed(self._model, names)
                # Without a state.json such a file is not ours.
                self._optimizer = (
                    _open_files(self.path, "optimizer", self.state, stack) if self.state else {}
                )
            except OSError as error:
                raise CheckpointError(f"{error.filename or path}: {error.strerror}") from error
            self._stack = stack.pop_all()
        self.model_specs = {name: place.tensor.spec for name, place in self._model.items()}
        self.optimizer_specs = {name: place.tensor.spec for name, place in self._optimizer.items()}

    def read_model(self, name: str, start: int, stop: int, out: Tensor) -> None:
        """Read elements [start, stop) of a weight or buffer into `out`, (stop - start,).

        `out` may have another dtype, where torch casts to it without changing the kind of number.
        After an exception its values are undefined.

        Raises:
            CheckpointError: there are no such elements, they are damaged, or `out` cannot hold them.
        """
        self._read(self._model, name, start, stop, out)

    def read_optimizer(self, name: str, start: int, stop: int, out: Tensor) -> None:
        """Read elements [start, stop) of an optimizer tensor into `out`, as `read_model` does."""
        self._read(self._optimizer, name, start, stop, out)

    def close(self) -> None:
        """Close all files."""
        self._stack.close()

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _read(
        self, places: Mapping[str, _Place], name: str, start: int, stop: int, out: Tensor
    ) -> None:
        if name not in places:
            raise CheckpointError(f"{self.path}: expected a tensor {name}, got none")
        file, (spec, begin, _) = places[name]
        if not 0 <= start <= stop <= spec.numel:
            raise CheckpointError(
                f"{file.path}: {name}: expected a range of its {spec.numel} elements, got "
                f"[{start}, {stop})"
            )
        if out.shape != (stop - start,):
            raise CheckpointError(
                f"{name}: expected out of shape {(stop - start,)}, got {tuple(out.shape)}"
            )
        if not torch.can_cast(spec.dtype, out.dtype):
            raise CheckpointError(
                f"{file.path}: {name}: expected {out.dtype} or what casts to it, got {spec.dtype}"
            )
        first = begin + start * spec.dtype.itemsize
        try:
            _read_range(file, first, spec.dtype, out.detach())
        except OSError as error:
            raise CheckpointError(f"{file.path}: {error.strerror}") from error


# -- opening -----------------------------------------------------------------------------------


def _read_state(directory: Path) -> dict[str, Any]:
    if not directory.is_dir():
        found = "a file" if directory.exists() else "nothing there"
        raise CheckpointError(f"{directory}: expected a checkpoint directory, got {found}")
    path = directory / STATE_NAME
    return read_state(path) if path.exists() else {}


def _renamed(places: Mapping[str, _Place], names: Callable[[str], str | None]) -> dict[str, _Place]:
    stored_as: dict[str, str] = {}
    for stored in places:
        name = names(stored)
        if name is None:
            continue
        if name in stored_as:
            raise CheckpointError(
                f"{name}: expected one tensor, got {stored_as[name]} and {stored}"
            )
        stored_as[name] = stored
    return {name: places[stored] for name, stored in stored_as.items()}


def _refuse_incomplete(directory: Path, *, has_model: bool) -> None:
    """Refuse a directory without `state.json` that is no Hugging Face directory either."""
    if find_files(directory, "optimizer"):
        raise CheckpointError(
            f"{directory / STATE_NAME}: expected a file, got nothing there: optimizer.safetensors "
            "belongs to a checkpoint"
        )
    if has_model:
        return
    pickled = sorted(path.name for path in directory.glob("pytorch_model*.bin*"))
    if pickled:
        raise CheckpointError(
            f"{directory}: expected model.safetensors, got {pickled[0]}: convert it to safetensors "
            "first (transformers: model.save_pretrained(..., safe_serialization=True))"
        )
    raise CheckpointError(
        f"{directory}: expected model.safetensors or {index_path(directory, 'model').name}, got neither"
    )


def _open_files(
    directory: Path, stem: str, state: Mapping[str, Any], stack: ExitStack
) -> dict[str, _Place]:
    """All tensors of the files `stem`; their descriptors are closed by `stack`."""
    files = find_files(directory, stem)
    checksums = state.get("checksums", {})
    missing = [name for name in checksums if name.startswith(stem) and name not in files]
    if missing:
        raise CheckpointError(f"{directory / missing[0]}: expected a file, got nothing there")
    places = {}
    for name, tensors in files.items():
        path = directory / name
        descriptor = os.open(path, os.O_RDONLY)
        stack.callback(os.close, descriptor)
        header = read_header(descriptor, str(path))
        file = _OpenFile(path, descriptor, header, _checksums_of(path, header, state))
        if tensors is not None and state and len(tensors) < len(header.tensors):
            raise CheckpointError(
                f"{index_path(directory, stem)}: expected all tensors of {name}, got some"
            )
        for tensor in header.tensors if tensors is None else tensors:
            if tensor not in header.tensors:
                raise CheckpointError(f"{path}: expected a tensor {tensor}, got none")
            places[tensor] = _Place(file, header.tensors[tensor])
    return places


def _checksums_of(path: Path, header: Header, state: Mapping[str, Any]) -> FileChecksums | None:
    if not state:
        return None
    content = state["checksums"].get(path.name)
    if isinstance(content, dict) and zlib.crc32(header.raw) != content.get("header"):
        raise CheckpointError(f"{path}: the header is damaged: its checksum differs")
    try:
        return parse_checksums(content, header)
    except CheckpointError as error:
        raise CheckpointError(f"{path.parent / STATE_NAME}: {path.name}: {error}") from None


# -- reading -----------------------------------------------------------------------------------


class _Piece(NamedTuple):
    """Bytes [begin, end) after the header, with their checksum."""

    begin: int
    end: int
    crc32: int | None


def _pieces(file: _OpenFile, begin: int, end: int) -> Iterator[_Piece]:
    """The pieces that bytes [begin, end) after the header lie in."""
    if begin == end:
        return
    if file.checksums is None:
        for first in range(begin, end, PIECE_NBYTES):
            yield _Piece(first, min(first + PIECE_NBYTES, end), None)
        return
    ends, crc32s = file.checksums.ends, file.checksums.crc32s
    first_piece = int(np.searchsorted(ends, begin, side="right"))
    for i in range(first_piece, len(ends)):
        piece_begin = int(ends[i - 1]) if i else 0
        if piece_begin >= end:
            return
        yield _Piece(piece_begin, int(ends[i]), int(crc32s[i]))


def _read_piece(file: _OpenFile, piece: _Piece, out: Tensor) -> None:
    """Read a piece into `out`, (bytes,) uint8, and verify it."""
    raw = out.numpy().data
    rest = raw
    while rest:
        count = os.preadv(file.descriptor, [rest], file.header.nbytes + piece.end - len(rest))
        if count == 0:
            raise CheckpointError(f"{file.path}: expected {len(rest)} bytes more: cut off")
        rest = rest[count:]
    if piece.crc32 is not None and zlib.crc32(raw) != piece.crc32:
        raise CheckpointError(
            f"{file.path}: bytes [{piece.begin}, {piece.end}) after the header are damaged: "
            "their checksum differs"
        )


def _read_range(file: _OpenFile, begin: int, dtype: torch.dtype, out: Tensor) -> None:
    """Read elements of `dtype` from byte `begin` after the header on, as many as `out` has.

    Whole pieces go straight into `out` where it has the file's dtype.
    """
    itemsize = dtype.itemsize
    end = begin + out.numel() * itemsize
    raw_out = None
    if out.dtype is dtype and out.is_contiguous() and out.device.type == "cpu" and out.numel():
        raw_out = out.view(torch.uint8)
    for piece in _pieces(file, begin, end):
        low, high = max(begin, piece.begin), min(end, piece.end)
        if raw_out is not None and (low, high) == (piece.begin, piece.end):
            _read_piece(file, piece, raw_out[low - begin : high - begin])
            continue
        raw = torch.empty(piece.end - piece.begin, dtype=torch.uint8)
        _read_piece(file, piece, raw)
        part = raw[low - piece.begin : high - piece.begin]
        if part.storage_offset() % itemsize or part.numel() % itemsize:
            raise CheckpointError(f"{file.path.parent / STATE_NAME}: a checksum cuts an element")
        first, last = (low - begin) // itemsize, (high - begin) // itemsize
        out[first:last].copy_(part.view(dtype))
