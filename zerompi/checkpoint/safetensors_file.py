"""The safetensors format: 8 bytes of header length, a JSON header, the tensors' bytes.

Source: https://huggingface.co/docs/safetensors ("Format").
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from zerompi.checkpoint.strict_json import parse_json
from zerompi.checkpoint.table import TensorSpec
from zerompi.errors import CheckpointError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# What the safetensors library accepts.
MAX_HEADER_NBYTES = 100_000_000


class StoredTensor(NamedTuple):
    """A tensor in a file: bytes [begin, end), counted from the end of the header."""

    spec: TensorSpec
    begin: int
    end: int


class Header(NamedTuple):
    """What stands before the tensors' bytes: `raw` is the first bytes of the file, length included."""

    raw: bytes
    tensors: dict[str, StoredTensor]

    @property
    def nbytes(self) -> int:
        """Where the tensors' bytes begin."""
        return len(self.raw)

    @property
    def data_nbytes(self) -> int:
        """Bytes of all tensors."""
        return max((tensor.end for tensor in self.tensors.values()), default=0)


def build_header(specs: Mapping[str, TensorSpec]) -> Header:
    """The header of a file with the tensors `specs`.

    Wider dtypes come first in the file, so that each tensor is aligned to its element size.

    Raises:
        CheckpointError: the format has no such dtype or name, or the header would be too long.
    """
    tensors, offset = {}, 0
    for name, spec in sorted(specs.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])):
        if spec.dtype not in _NAMES:
            raise CheckpointError(f"{name}: safetensors files cannot hold {spec.dtype}")
        if name == "__metadata__":
            raise CheckpointError(
                "__metadata__: safetensors files cannot hold a tensor of that name"
            )
        tensors[name] = StoredTensor(spec, offset, offset + spec.nbytes)
        offset += spec.nbytes
    content: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for name, (spec, begin, end) in sorted(tensors.items()):
        content[name] = {
            "dtype": _NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_NBYTES:
        raise CheckpointError(
            f"header: expected at most {MAX_HEADER_NBYTES} bytes, got {len(text)}; lower "
            "max_shard_nbytes"
        )
    return Header(struct.pack("<Q", len(text)) + text, tensors)


def read_header(descriptor: int, path: str) -> Header:
    """Read and check the header of an open file; `path` is for messages.

    Raises:
        CheckpointError: it is no safetensors file, or one that is damaged or cut off.
    """
    try:
        return _read_header(descriptor)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None


def _read_header(descriptor: int) -> Header:
    file_nbytes = os.fstat(descriptor).st_size
    prefix = os.pread(descriptor, 8, 0)
    if len(prefix) < 8:
        raise CheckpointError(f"expected a safetensors file, got {len(prefix)} bytes")
    (length,) = struct.unpack("<Q", prefix)
    if length > MAX_HEADER_NBYTES:
        raise CheckpointError(
            f"header: expected at most {MAX_HEADER_NBYTES} bytes, got {length}: no safetensors file"
        )
    text = os.pread(descriptor, length, 8)
    if len(text) < length:
        raise CheckpointError(f"header: expected {length} bytes, got {len(text)}: cut off")
    tensors = _parse(text)
    header = Header(prefix + text, tensors)
    expected = header.nbytes + header.data_nbytes
    if file_nbytes != expected:
        state = "cut off" if file_nbytes < expected else "damaged"
        raise CheckpointError(f"expected {expected} bytes, got {file_nbytes}: {state}")
    return header


def _parse(text: bytes) -> dict[str, StoredTensor]:
    content = parse_json(text, "header")
    metadata = content.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError("header: __metadata__: expected strings by name")
    tensors = {name: _stored_tensor(name, entry) for name, entry in content.items()}
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1][1:]):
        if tensor.begin != end:
            raise CheckpointError(
                f"header: {name}: expected bytes from {end} on, got {tensor.begin}: "
                f"{'a gap' if tensor.begin > end else 'tensors overlap'}"
            )
        end = tensor.end
    return tensors


def _stored_tensor(name: str, entry: Any) -> StoredTensor:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"header: {name}: expected dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(f"header: {name}: expected dtype {'/'.join(DTYPES)}, got {dtype!r}")
    if not _are_sizes(shape):
        raise CheckpointError(f"header: {name}: expected a shape, got {shape!r}")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise CheckpointError(f"header: {name}: expected two data_offsets, got {offsets!r}")
    spec = TensorSpec(tuple(shape), DTYPES[dtype])
    if offsets[1] - offsets[0] != spec.nbytes:
        raise CheckpointError(
            f"header: {name}: expected {spec.nbytes} bytes for {dtype} of shape {spec.shape}, got "
            f"data_offsets {offsets}"
        )
    return StoredTensor(spec, *offsets)


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 2**63 for v in value)
