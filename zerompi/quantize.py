"""Quantized communication: which messages are quantized, and how."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from zerompi.collectives.quantized import QUANTIZED_DTYPES, Code, Packer

Kind = Literal["int8", "int4"]

_BITS = {"int8": 8, "int4": 4}


@dataclass(frozen=True)
class Quantize:
    """Messages with 8 or 4 bits for a number instead of 16 or 32.

    Symmetric, in blocks of elements that follow each other: the largest magnitude of a block, a, has the
    largest code, q = 127 (int8) or 7 (int4); the scale of the block is s = a / q, and x is sent as the whole
    number nearest to x / s. What arrives differs from x by at most

        s / 2 = a / (2 q): a / 254 with int8, a / 14 with int4,

    but for rounding in float32: a relative 1e-6 of a, or 2^-149 where the scale is subnormal. A block of
    zeros arrives exactly. A block with an infinity or NaN arrives as NaN as a whole, so that no
    overflow is lost.

    A reduced gradient adds up such errors: a / (2 q) of each summand that was quantized. These are all
    ranks' summands if every rank is a node; with several ranks on a node the nodes' sums, and, where the
    ranks of a node share no memory, before them the ranks' own.

    Only what is sent is quantized, of float32, bfloat16 and float16; shards, main weights,
    optimizer states, checkpoints and `full_state_dict` stay exact.

    Attributes:
        weights: of the parameters that stage 3 gathers (qwZ); None does not quantize them. All ranks
            compute with the same, quantized, values.
        gradients: of the reduce-scatter of gradients at stages 1 to 3 (qgZ); None does not quantize
            them. The all-reduce between copies (`shard_ranks`) is never quantized.
        block: how many elements have one scale of 4 bytes; an even number. Smaller ones are more exact.
        error_feedback: what the quantization of gradients has lost is kept, 4 bytes for each element that
            a rank quantizes, and added to the next gradient.

    Wang et al., arXiv:2306.10209, sections 3.1 and 3.3 (ZeRO++).
    """

    weights: Kind | None = "int8"
    gradients: Kind | None = "int4"
    block: int = 256
    error_feedback: bool = False

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        for field in ("weights", "gradients"):
            value = getattr(self, field)
            if value is not None and value not in _BITS:
                raise ValueError(f"{field}: expected 'int8', 'int4' or None, got {value!r}")
        if self.weights is None and self.gradients is None:
            raise ValueError("weights: expected 'int8' or 'int4' where gradients is None, got None")
        if isinstance(self.block, bool) or not isinstance(self.block, int):
            raise TypeError(f"block: expected an even number, got {self.block!r}")
        if self.block < 2 or self.block % 2:
            raise ValueError(f"block: expected a positive even number, got {self.block}")
        if not isinstance(self.error_feedback, bool):
            raise TypeError(f"error_feedback: expected True or False, got {self.error_feedback!r}")
        if self.error_feedback and self.gradients is None:
            raise ValueError(
                "error_feedback: expected False where gradients are not quantized, got True"
            )

    def weight_code(self, dtype: torch.dtype) -> Code | None:
        """How parameters of `dtype` are sent; None: as they are."""
        if self.weights is None or dtype not in QUANTIZED_DTYPES:
            return None
        return Code(_BITS[self.weights], self.block)

    def gradient_packer(self, dtype: torch.dtype) -> Packer | None:
        """What quantizes gradients of `dtype`; None: nothing does."""
        if self.gradients is None or dtype not in QUANTIZED_DTYPES:
            return None
        code = Code(_BITS[self.gradients], self.block)
        return Packer(code, error_feedback=self.error_feedback)
