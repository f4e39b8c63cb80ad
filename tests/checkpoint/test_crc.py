"""CRC-32 of the whole from that of the parts."""

from __future__ import annotations

import json
import random
import zlib

import numpy as np
import torch

from zerompi.checkpoint.crc import join_crc32s


def test_joined_checksums_are_those_of_the_whole() -> None:
    chance = random.Random(0)
    sizes = [[1], [5, 0, 7], [4 << 20, 1], [3, 1 << 20, 2, 999]]
    sequences = [[chance.randbytes(size) for size in parts] for parts in sizes]
    crc32s = [zlib.crc32(part) for parts in sequences for part in parts]
    behind = [sum(parts[i + 1 :]) for parts in sizes for i in range(len(parts))]
    starts = np.cumsum([0, *(len(parts) for parts in sizes[:-1])])
    joined = join_crc32s(np.array(crc32s), np.array(behind), starts)
    assert joined.tolist() == [zlib.crc32(b"".join(parts)) for parts in sequences]


def test_state_json_has_the_checksum_of_each_tensor(
    save, shared_path, comm, random_tensors
) -> None:
    save(shared_path / "c", random_tensors(0), comm)
    checksums = json.loads((shared_path / "c/state.json").read_text())["checksums"]
    assert checksums["model.safetensors"]["tensors"] == {
        name: zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
        for name, tensor in random_tensors(0).items()
    }
