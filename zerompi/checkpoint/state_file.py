"""`state.json`: everything of a checkpoint that is no tensor, and the checksums of the files."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

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


def state_text(
    state: Mapping[str, Any], num_ranks: int, checksums: Mapping[str, Mapping[str, Any]]
) -> str:
    """The text of `state.json`; `checksums` is by file name."""
    content = {
        **state,
        "format_version": FORMAT_VERSION,
        "versions": {"zerompi": __version__, "torch": torch.__version__},
        "ranks": num_ranks,
        "checksums": checksums,
    }
    return json.dumps(content) + "\n"


def read_state(path: Path) -> dict[str, Any]:
    """The content of `state.json`.

    Raises:
        CheckpointError: it is no JSON, or of a format version that is not known.
    """
    state = parse_json(path.read_bytes(), str(path))
    version = state.get("format_version")
    if type(version) is not int or version < 1:
        raise CheckpointError(f"{path}: format_version: expected a number, got {version!r}")
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format_version: expected at most {FORMAT_VERSION}, got {version}: a newer zerompi "
            "has written this checkpoint"
        )
    if not isinstance(state.get("checksums"), dict):
        raise CheckpointError(f"{path}: expected checksums, got none")
    return state


# -- checksums ---------------------------------------------------------------------------------


class FileChecksums(NamedTuple):
    """CRC-32 of a file's header, and of its pieces: each begins where the one before ends.

    Ends are counted from the end of the header; both arrays are (pieces,), int64.
    """

    header: int
    ends: np.ndarray
    crc32s: np.ndarray


def build_checksums(header: bytes, rows: Sequence[np.ndarray]) -> dict[str, Any]:
    """For `state.json`, from (begin, end, crc32) of the pieces of all ranks, each (pieces, 3)."""
    pieces = np.concatenate(rows)
    pieces = pieces[np.argsort(pieces[:, 0])]
    return {"header": zlib.crc32(header), "pieces": pieces[:, 1:].tolist()}


def parse_checksums(content: Any, data_nbytes: int) -> FileChecksums:
    """The reverse of `build_checksums`, for a file with `data_nbytes` bytes of tensors.

    Raises:
        CheckpointError: these are no checksums of such a file.
    """
    try:
        header, rows = int(content["header"]), content["pieces"]
        pieces = np.array(rows, dtype=np.int64).reshape(-1, 2)
        ends = pieces[:, 0]
    except (TypeError, ValueError, KeyError, OverflowError) as error:
        raise CheckpointError(f"expected the checksums of a file, got others: {error}") from None
    nbytes = np.diff(ends, prepend=0)
    if (nbytes <= 0).any() or (nbytes > _MAX_PIECE_NBYTES).any() or nbytes.sum() != data_nbytes:
        raise CheckpointError(f"expected checksums of {data_nbytes} bytes, got others")
    return FileChecksums(header, ends, pieces[:, 1])
