"""Text as tokens: reading, the held-out split, and the windows of each step."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from mpi4py import MPI
from numpy.typing import NDArray
from torch import Tensor

from zerompi.train.config import InputError

Tokens = NDArray[Any]


class Codec(Protocol):
    """From text to tokens and back."""

    name: str

    def encode(self, text: NDArray[np.uint8]) -> Tokens:
        """The tokens of `text`, given as bytes; 1-D integers."""

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of `tokens`."""


class ByteCodec:
    """A byte is a token."""

    name = "bytes"

    def encode(self, text: NDArray[np.uint8]) -> Tokens:
        """`text` itself."""
        return text

    def decode(self, tokens: Sequence[int]) -> str:
        """The text; tokens that are no byte read as question marks."""
        return bytes(t if t < 256 else ord("?") for t in tokens).decode("utf-8", errors="replace")


@dataclass(frozen=True)
class Corpus:
    """A text whose last tenth is held out.

    Attributes:
        name: what was read.
        codec: its tokens.
        train: tokens to train on, 1-D integers.
        held_out: tokens of the last tenth of the bytes, 1-D integers.
        num_bytes: of the whole text.
        held_out_bytes: of the held-out part.
        unigram_entropy: bits per byte of a model that knows only how frequent each byte is.
    """

    name: str
    codec: Codec
    train: Tokens
    held_out: Tokens
    num_bytes: int
    held_out_bytes: int
    unigram_entropy: float

    def digest(self) -> tuple[int, int, int, int]:
        """Sizes and checksums of both parts, equal on ranks that see the same text."""
        return (
            len(self.train),
            zlib.crc32(np.ascontiguousarray(self.train).data),
            len(self.held_out),
            zlib.crc32(np.ascontiguousarray(self.held_out).data),
        )


def load_corpus(source: str | None, codec: Codec, context: int) -> Corpus:
    """Read and split a text.

    Args:
        source: a file, a directory, or None for the text that every Python carries.
        codec: makes the tokens.
        context: tokens of one window; both parts must hold at least one.

    Raises:
        InputError, OSError: there is no such text, or it is too short.
    """
    name, text = _python_documentation() if source is None else _read(Path(source))
    cut = len(text) * 9 // 10
    corpus = Corpus(
        name=name,
        codec=codec,
        train=codec.encode(text[:cut]),
        held_out=codec.encode(text[cut:]),
        num_bytes=len(text),
        held_out_bytes=len(text) - cut,
        unigram_entropy=unigram_entropy(text),
    )
    for part, tokens in (("first nine tenths", corpus.train), ("held-out tenth", corpus.held_out)):
        if len(tokens) < context + 1:
            raise InputError(
                f"--data: {name}: expected at least --context + 1 = {context + 1} tokens in the "
                f"{part}, got {len(tokens)}"
            )
    return corpus


def check_same_corpus(corpus: Corpus, comm: MPI.Intracomm) -> None:
    """Refuse ranks that read different texts. Collective.

    Raises:
        InputError: on all ranks.
    """
    digests = comm.allgather(corpus.digest())
    for rank, digest in enumerate(digests):
        if digest != digests[0]:
            raise InputError(f"--data: {corpus.name}: rank {rank} reads another text than rank 0")


def _python_documentation() -> tuple[str, NDArray[np.uint8]]:
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[key] for key in sorted(topics))
    return "pydoc_data.topics", np.frombuffer(text.encode(), dtype=np.uint8)


def _read(path: Path) -> tuple[str, NDArray[np.uint8]]:
    if not path.is_dir():
        size = path.stat().st_size
        if not size:
            raise InputError(f"--data: {path}: expected text, got an empty file")
        # Mapped: the ranks of a node share one copy in the page cache.
        return str(path), np.memmap(path, dtype=np.uint8, mode="r")
    files = sorted(
        file
        for file in path.rglob("*")
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(path).parts)
    )
    parts = [np.fromfile(file, dtype=np.uint8) for file in files]
    if not sum(len(part) for part in parts):
        raise InputError(
            f"--data: {path}: expected a directory with text, got {len(files)} files, all empty"
        )
    return f"{path} ({len(files)} files)", np.concatenate(parts)


def unigram_entropy(text: NDArray[np.uint8]) -> float:
    """Entropy of the bytes' frequencies, bits per byte."""
    counts = np.bincount(text, minlength=256)
    shares = counts[counts > 0] / len(text)
    return float(-(shares * np.log2(shares)).sum())


# -- windows -----------------------------------------------------------------------------------


def training_offset(seed: int, step: int, sample: int, bound: int) -> int:
    """Where sample `sample` of step `step` starts, in [0, bound).

    Drawn from a counter-based generator (Philox, Salmon et al., SC'11), so that it depends on
    these numbers alone: not on the number of ranks, and not on what was drawn before.
    """
    word = int(np.random.Philox(key=seed, counter=[0, 0, step, sample]).random_raw())
    return word * bound >> 64


def training_windows(
    tokens: Tokens, context: int, *, seed: int, step: int, samples: Iterable[int]
) -> tuple[Tensor, Tensor]:
    """Inputs and targets of `samples` of step `step`; each (samples, context), int64."""
    bound = len(tokens) - context
    return windows(tokens, [training_offset(seed, step, s, bound) for s in samples], context)


def held_out_starts(num_tokens: int, context: int, at_most: int) -> list[int]:
    """Starts of windows that do not overlap, spread evenly over the held-out tokens."""
    available = (num_tokens - 1) // context
    count = min(available, at_most)
    return [index * available // count * context for index in range(count)]


def windows(tokens: Tokens, starts: Sequence[int], context: int) -> tuple[Tensor, Tensor]:
    """Inputs and next-token targets of the windows at `starts`; each (windows, context), int64."""
    rows = np.stack([np.asarray(tokens[s : s + context + 1], dtype=np.int64) for s in starts])
    both = torch.from_numpy(rows)
    return both[:, :-1].contiguous(), both[:, 1:].contiguous()
