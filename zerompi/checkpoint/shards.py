"""Which files of a checkpoint hold which tensors, by the conventions of Hugging Face."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from zerompi.checkpoint.safetensors_file import Header, build_header
from zerompi.checkpoint.strict_json import parse_json
from zerompi.checkpoint.table import TensorSpec
from zerompi.errors import CheckpointError

DEFAULT_MAX_SHARD_NBYTES = 5_000_000_000
_PLAIN_NAME = re.compile(r"[^/\\\0\ud800-\udfff]+\.safetensors")


class ShardFile(NamedTuple):
    """A file to be written."""

    name: str
    header: Header


def plan_files(
    stem: str, specs: Mapping[str, TensorSpec], max_shard_nbytes: int
) -> list[ShardFile]:
    """Distribute tensors over files of at most `max_shard_nbytes` bytes, in the order of their names.

    A tensor that is larger has a file of its own.
    """
    groups: list[dict[str, TensorSpec]] = [{}]
    nbytes = 0
    for name, spec in sorted(specs.items()):
        if groups[-1] and nbytes + spec.nbytes > max_shard_nbytes:
            groups.append({})
            nbytes = 0
        groups[-1][name] = spec
        nbytes += spec.nbytes
    if len(groups) == 1:
        return [ShardFile(f"{stem}.safetensors", build_header(groups[0]))]
    return [
        ShardFile(f"{stem}-{i:05d}-of-{len(groups):05d}.safetensors", build_header(group))
        for i, group in enumerate(groups, start=1)
    ]


def index_of(files: list[ShardFile]) -> str:
    """The text of the index of several files."""
    content = {
        "metadata": {"total_size": sum(file.header.data_nbytes for file in files)},
        "weight_map": {
            name: file.name for name, file in sorted(_by_tensor(files), key=lambda item: item[0])
        },
    }
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def _by_tensor(files: list[ShardFile]) -> Iterator[tuple[str, ShardFile]]:
    return ((name, file) for file in files for name in file.header.tensors)


def index_path(directory: Path, stem: str) -> Path:
    """Where the index of several files stands."""
    return directory / f"{stem}.safetensors.index.json"


def find_files(directory: Path, stem: str) -> dict[str, list[str] | None]:
    """The names of the files that hold the tensors `stem`, and the tensors to take from each.

    None: all tensors of the file. Empty if there is neither a file nor an index.

    Raises:
        CheckpointError: the index is damaged or names files that are not there.
    """
    single = f"{stem}.safetensors"
    if (directory / single).exists():
        return {single: None}
    index = index_path(directory, stem)
    if not index.exists():
        return {}
    weight_map = parse_json(index.read_bytes(), str(index)).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{index}: expected a weight_map")
    files: dict[str, list[str] | None] = {}
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not _PLAIN_NAME.fullmatch(name):
            raise CheckpointError(f"{index}: {tensor}: expected a file beside it, got {name!r}")
        tensors = files.setdefault(name, [])
        assert tensors is not None
        tensors.append(tensor)
    missing = sorted(name for name in files if not (directory / name).exists())
    if missing:
        raise CheckpointError(
            f"{index}: expected {', '.join(missing)} beside it, got nothing there"
        )
    return files
