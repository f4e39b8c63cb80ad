"""Mutated checkpoints: refused with nothing changed, or loaded as they were saved.

ZEROMPI_FUZZ is how many; 10,000 take some minutes.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from mpi4py import MPI

import zerompi
from zerompi.generators import generator_states

COUNT = int(os.environ.get("ZEROMPI_FUZZ", "300"))
HUGE = (-1, 0, 1, 2**31, 2**53, 2**63, 2**64, 10**30, -(2**63), 1e308, float("inf"))
ODD = (None, True, "", "x", "\ud800", [], {}, [[]], {"a": 1}, [1, 2], *HUGE)


class State(NamedTuple):
    """All that a load may change."""

    tensors: list[torch.Tensor]
    settings: str
    rng: str


class Run:
    """A small model whose state can be looked at and put back."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01 * seed)
        self.zero = zerompi.partition(self.model, self.optimizer, stage=3, comm=MPI.COMM_SELF)
        for _ in range(2):
            self.model(torch.randn(5, 3)).square().mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    def state(self) -> State:
        weights = list(self.zero.full_state_dict().values())
        pieces = [piece for group in self.optimizer.param_groups for piece in group["params"]]
        states = [v for p in pieces for _, v in sorted(self.optimizer.state[p].items())]
        groups = [
            {k: v for k, v in g.items() if k != "params"} for g in self.optimizer.param_groups
        ]
        tensors = [t.clone() for t in (*weights, *states)]
        return State(tensors, repr(groups), repr(generator_states()))


def same(a: State, b: State, *, tensors_only: bool = False) -> bool:
    equal = len(a.tensors) == len(b.tensors) and all(map(torch.equal, a.tensors, b.tensors))
    return equal and (tensors_only or a[1:] == b[1:])


# -- mutations ---------------------------------------------------------------------------------


class Mutator:
    """Damages a copy of a checkpoint; `other` is one of the same model with other numbers."""

    def __init__(self, directory: Path, other: Path, chance: random.Random) -> None:
        self.directory = directory
        self.other = other
        self.chance = chance

    def file(self, pattern: str = "*") -> Path:
        return self.chance.choice(sorted(self.directory.glob(pattern)))

    def flip_bits(self) -> None:
        path = self.file()
        raw = bytearray(path.read_bytes())
        for _ in range(self.chance.choice((1, 1, 2, 8))):
            raw[self.chance.randrange(len(raw))] ^= 1 << self.chance.randrange(8)
        path.write_bytes(raw)

    def cut(self) -> None:
        path = self.file()
        os.truncate(path, self.chance.randrange(path.stat().st_size))

    def extend(self) -> None:
        with self.file().open("ab") as stream:
            stream.write(self.chance.randbytes(self.chance.choice((1, 8, 4096))))

    def overwrite(self) -> None:
        path = self.file()
        raw = bytearray(path.read_bytes())
        start = self.chance.randrange(len(raw))
        block = self.chance.randbytes(self.chance.randrange(1, 64))
        raw[start : start + len(block)] = block
        path.write_bytes(raw)

    def exchange_blocks(self) -> None:
        path = self.file()
        raw = bytearray(path.read_bytes())
        size = self.chance.choice((1, 4, 16))
        a, b = sorted(self.chance.sample(range(0, len(raw) - size), 2))
        raw[a : a + size], raw[b : b + size] = raw[b : b + size], raw[a : a + size]
        path.write_bytes(raw)

    def remove(self) -> None:
        path = self.file()
        path.unlink()
        kind = self.chance.randrange(4)
        if kind == 1:
            path.mkdir()
        elif kind == 2:
            path.symlink_to("nowhere")
        elif kind == 3:
            path.write_bytes(b"")

    def swap_in(self) -> None:
        """A file of the other checkpoint, or another one of this."""
        path = self.file()
        source = self.chance.choice((self.other / path.name, self.file()))
        raw = source.read_bytes()
        path.write_bytes(raw)

    def edit_header(self) -> None:
        path = self.file("*.safetensors")
        raw = path.read_bytes()
        (length,) = struct.unpack("<Q", raw[:8])
        text = self.edited(raw[8 : 8 + length])
        length = self.chance.choice((len(text), len(text), len(text), 0, 2**63 - 1, 2**64 - 1))
        path.write_bytes(struct.pack("<Q", length) + text + raw[8 + length :][: len(raw)])

    def edit_json(self) -> None:
        path = self.file("*.json")
        path.write_bytes(self.edited(path.read_bytes()))

    def edit_and_seal(self) -> None:
        """As somebody would who knows the format."""
        path = self.directory / "state.json"
        content = json.loads(path.read_bytes())
        content.pop("crc32")
        for _ in range(self.chance.choice((1, 1, 3))):
            self.edit(content)
        text = json.dumps(content)[:-1]
        if text == "{":
            text += '"a": 1'
        path.write_text(f'{text}, "crc32": {zlib.crc32(text.encode())}}}\n')

    def edited(self, text: bytes) -> bytes:
        if self.chance.random() < 0.2:  # a key twice
            key = self.chance.choice((b'"__metadata__":{},', b'"crc32": 0, ', b'"rng": [], '))
            return text.replace(b"{", b"{" + key, 1)
        content = json.loads(text)
        self.edit(content)
        return json.dumps(content).encode()

    def edit(self, content: Any) -> None:
        """Change something somewhere in nested JSON."""
        while True:
            keys: list[Any] = (
                list(content) if isinstance(content, dict) else list(range(len(content)))
            )
            if not keys:
                return
            key = self.chance.choice(keys)
            if (
                isinstance(content[key], (dict, list))
                and content[key]
                and self.chance.random() < 0.8
            ):
                content = content[key]
                continue
            kind = self.chance.randrange(4)
            if kind == 0:
                del content[key]
            elif kind == 1 and isinstance(content, dict):
                content[self.chance.choice(("x", "a.b", "", "exp_avg.0.weight"))] = content.pop(key)
            elif kind == 2:
                other = self.chance.choice(keys)
                content[key], content[other] = content[other], content[key]
            else:
                content[key] = self.chance.choice(ODD)
            return

    def mutate(self) -> str:
        mutations: list[Callable[[], None]] = [
            self.flip_bits, self.cut, self.extend, self.overwrite, self.exchange_blocks, self.remove,
            self.swap_in, self.edit_header, self.edit_json, self.edit_and_seal,
        ]  # fmt: skip
        chosen = self.chance.choice(mutations)
        chosen()
        return chosen.__name__


# -- the test ----------------------------------------------------------------------------------


@pytest.mark.skipif(MPI.COMM_WORLD.size > 1, reason="one rank finds the same")
def test_a_mutated_checkpoint_is_refused_or_loads_as_it_was_saved(tmp_path) -> None:
    chance = random.Random(0)
    right, wrong = Run(1), Run(2)
    for name, limit in (("plain", 10**9), ("sharded", 64)):
        right.zero.save(tmp_path / name, extra={"step": 1}, max_shard_size=limit)
        wrong.zero.save(tmp_path / f"other-{name}", extra={"step": 1}, max_shard_size=limit)
    wrong.zero.save(tmp_path / "start")
    saved, start = right.state(), wrong.state()
    settings = dict(wrong.optimizer.param_groups[0])
    outcomes: Counter[str] = Counter()
    for number in range(COUNT):
        name = chance.choice(("plain", "sharded"))
        mutated = tmp_path / "mutated"
        shutil.copytree(tmp_path / name, mutated)
        mutation = Mutator(mutated, tmp_path / f"other-{name}", chance).mutate()
        case = f"number {number}: {mutation} of {name}"
        try:
            extra = wrong.zero.load(mutated)
        except zerompi.ZerompiError:
            assert same(wrong.state(), start), case
            outcomes["refused"] += 1
        else:
            sealed = mutation == "edit_and_seal"
            assert extra == {"step": 1} or sealed, case
            assert same(wrong.state(), saved, tensors_only=sealed), case
            wrong.optimizer.param_groups[0].clear()  # a setting under a new name would stay
            wrong.optimizer.param_groups[0].update(settings)
            wrong.zero.load(tmp_path / "start")
            assert same(wrong.state(), start), case
            outcomes["loaded"] += 1
        shutil.rmtree(mutated)
    print(dict(outcomes))
    assert outcomes["refused"] > COUNT / 2
    right.zero.close()
    wrong.zero.close()
