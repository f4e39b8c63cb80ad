"""`state.json`: everything of a checkpoint that is no tensor, and the checksums of the files."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from mpi4py import MPI

from zerompi.checkpoint.crc import join_crc32s
from zerompi.checkpoint.safetensors_file import Header
from zerompi.checkpoint.strict_json import parse_json
from zerompi.errors import CheckpointError
from zerompi.version import __version__

STATE_NAME = "state.json"
FORMAT_VERSION = 1
# A reader verifies whole pieces: shorter ones cost space in state.json, longer ones superfluous
# reading.
PIECE_NBYTES = 4 << 20
# More than a reader wants to hold at once.
_MAX_PIECE_NBYTES = 64 << 20
_MPI = MPI.Get_library_version().strip("\0").splitlines()[0]
# The file's last bytes: the CRC-32 of all before them.
_SEAL = re.compile(rb',\s*"crc32":\s*([0-9]{1,10})\s*\}\s*')


def state_text(
    state: Mapping[str, Any], num_ranks: int, checksums: Mapping[str, Mapping[str, Any]]
) -> str:
    """The text of `state.json`, ASCII; `checksums` is by file name."""
    content = {
        **state,
        "format_version": FORMAT_VERSION,
        "versions": {
            "zerompi": __version__,
            "torch": torch.__version__,
            "mpi": _MPI,
        },
        "ranks": num_ranks,
        "checksums": checksums,
    }
    content.pop("crc32", None)
    text = json.dumps(content)[:-1]
    return f'{text}, "crc32": {zlib.crc32(text.encode())}}}\n'


def read_state(path: Path) -> dict[str, Any]:
    """The content of `state.json`.

    Raises:
        CheckpointError: it is no JSON, of a format version that is not known, or damaged.
    """
    raw = path.read_bytes()
    state = parse_json(raw, str(path))
    version = state.get("format_version")
    if type(version) is not int or version < 1:
        raise CheckpointError(f"{path}: format_version: expected a number, got {version!r}")
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format_version: expected at most {FORMAT_VERSION}, got {version}: a newer zerompi "
            "has written this checkpoint"
        )
    body, seal, _ = raw.rpartition(b', "crc32"')
    match = _SEAL.fullmatch(raw, len(body))
    if not seal or match is None or zlib.crc32(body) != int(match[1]):
        raise CheckpointError(f"{path}: damaged, or edited by hand: its checksum differs")
    if not isinstance(state.get("checksums"), dict):
        raise CheckpointError(f"{path}: expected checksums, got none")
    return state


class FileChecksums(NamedTuple):
    """CRC-32 of a file's header, and of its pieces: each begins where the one before ends.

    Ends are counted from the end of the header; both arrays are (pieces,), int64.
    """

    header: int
    ends: np.ndarray
    crc32s: np.ndarray


def build_checksums(header: Header, rows: np.ndarray) -> dict[str, Any]:
    """For `state.json`, from (begin, end, crc32) of the pieces of all ranks, (pieces, 3).

    `header` is the CRC-32 of the bytes before the tensors; `pieces` has the end and the CRC-32 of
    each, in the order of the file; `tensors` the CRC-32 of each tensor's bytes.
    """
    pieces = rows[np.argsort(rows[:, 0])]
    crc32s = _tensor_crc32s(header, pieces[:, 1], pieces[:, 2])
    return {"header": zlib.crc32(header.raw), "pieces": pieces[:, 1:].tolist(), "tensors": crc32s}


def _tensor_crc32s(header: Header, ends: np.ndarray, crc32s: np.ndarray) -> dict[str, int]:
    """From the pieces of a file; they end where tensors end."""
    filled = {name: tensor for name, tensor in header.tensors.items() if tensor.end > tensor.begin}
    found = dict.fromkeys(header.tensors, 0)
    if filled:
        names = sorted(filled, key=lambda name: filled[name].begin)
        tensor_ends = np.array([filled[name].end for name in names], dtype=np.int64)
        last = np.searchsorted(ends, tensor_ends)
        if (last >= len(ends)).any() or (ends[last] != tensor_ends).any():
            raise CheckpointError("expected checksums of each tensor, got others")
        owner = np.searchsorted(tensor_ends, ends)
        starts = np.concatenate([[0], last[:-1] + 1])
        found.update(
            zip(names, join_crc32s(crc32s, tensor_ends[owner] - ends, starts).tolist(), strict=True)
        )
    return found


def parse_checksums(content: Any, header: Header) -> FileChecksums:
    """The reverse of `build_checksums`, for a file with this header.

    Raises:
        CheckpointError: these are no checksums of such a file.
    """
    try:
        crc32, rows, tensors = int(content["header"]), content["pieces"], content["tensors"]
        pieces = np.array(rows, dtype=np.int64).reshape(-1, 2)
        ends = pieces[:, 0]
    except (TypeError, ValueError, KeyError, OverflowError) as error:
        raise CheckpointError(f"expected the checksums of a file, got others: {error}") from None
    nbytes = np.diff(ends, prepend=0)
    expected = header.data_nbytes
    if (nbytes <= 0).any() or (nbytes > _MAX_PIECE_NBYTES).any() or nbytes.sum() != expected:
        raise CheckpointError(f"expected checksums of {expected} bytes, got others")
    if (pieces[:, 1] < 0).any() or (pieces[:, 1] >= 1 << 32).any():
        raise CheckpointError("expected 32-bit checksums, got others")
    if tensors != _tensor_crc32s(header, ends, pieces[:, 1]):
        raise CheckpointError("the checksums of its tensors and of its pieces differ")
    return FileChecksums(crc32, ends, pieces[:, 1])
