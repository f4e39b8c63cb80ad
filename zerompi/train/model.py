"""A byte-level GPT: pre-norm blocks, causal attention, rotary positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

VOCABULARY = 256


@dataclass(frozen=True)
class GPTConfig:
    """Sizes of a GPT."""

    layers: int
    width: int
    heads: int
    checkpoint_activations: bool = False


class Linear(nn.Linear):
    """A linear layer without bias whose initial weights are normal with deviation `std`."""

    def __init__(self, in_features: int, out_features: int, std: float) -> None:
        self.std = std
        super().__init__(in_features, out_features, bias=False)

    def reset_parameters(self) -> None:
        """Draw the initial weights."""
        nn.init.normal_(self.weight, std=self.std)


class Embedding(nn.Embedding):
    """An embedding whose initial vectors are normal with deviation 0.02."""

    def reset_parameters(self) -> None:
        """Draw the initial vectors."""
        nn.init.normal_(self.weight, std=0.02)


class Rotation(NamedTuple):
    """Cosine and sine of each position's angles; each (time, head width / 2)."""

    cos: Tensor
    sin: Tensor

    @classmethod
    def of_positions(
        cls, time: int, head_width: int, device: torch.device | None = None
    ) -> Rotation:
        """The angles of positions 0 to `time` (Su et al., arXiv:2104.09864, section 3.2.2)."""
        frequency = 10_000.0 ** (-torch.arange(0, head_width, 2, device=device) / head_width)
        angle = torch.outer(torch.arange(time, device=device), frequency)
        return cls(angle.cos(), angle.sin())

    def apply(self, x: Tensor) -> Tensor:
        """Rotate `x`, (..., time, head width)."""
        cos, sin = self.cos.to(x.dtype), self.sin.to(x.dtype)
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class Block(nn.Module):
    """Attention and a feed-forward network, each on the normalised residual stream."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        width = config.width
        # Radford et al. 2019 (GPT-2), section 2.3: layers that write into the residual
        # stream start smaller, by the square root of their number.
        residual_std = 0.02 / (2 * config.layers) ** 0.5
        self.heads = config.heads
        self.attention_norm = nn.LayerNorm(width)
        self.query_key_value = Linear(width, 3 * width, 0.02)
        self.attention_out = Linear(width, width, residual_std)
        self.feed_forward_norm = nn.LayerNorm(width)
        self.up = Linear(width, 4 * width, 0.02)
        self.down = Linear(4 * width, width, residual_std)

    def forward(self, x: Tensor, rotation: Rotation) -> Tensor:
        """(batch, time, width) -> the same."""
        x = x + self._attend(self.attention_norm(x), rotation)
        hidden: Tensor = self.down(F.gelu(self.up(self.feed_forward_norm(x))))
        return x + hidden

    def _attend(self, x: Tensor, rotation: Rotation) -> Tensor:
        batch, time, width = x.shape
        split = self.query_key_value(x).view(batch, time, 3, self.heads, width // self.heads)
        query, key, value = split.permute(2, 0, 3, 1, 4)
        query, key = rotation.apply(query), rotation.apply(key)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        out: Tensor = self.attention_out(mixed.transpose(1, 2).reshape(batch, time, width))
        return out


class GPT(nn.Module):
    """From bytes, (batch, time) int64, to logits of the next byte, (batch, time, 256)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.checkpoint_activations = config.checkpoint_activations
        self.head_width = config.width // config.heads
        self.embedding = Embedding(VOCABULARY, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.head = Linear(config.width, VOCABULARY, 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the byte after each of `tokens`."""
        rotation = Rotation.of_positions(tokens.shape[1], self.head_width, tokens.device)
        x = self.embedding(tokens)
        for block in self.blocks:
            if self.checkpoint_activations and torch.is_grad_enabled():
                x = checkpoint(block, x, rotation, use_reentrant=False)
            else:
                x = block(x, rotation)
        logits: Tensor = self.head(self.norm(x))
        return logits


def make_gpt(config: GPTConfig) -> GPT:
    """A GPT on the meta device: `zerompi.partition` fills it, and no rank holds the whole."""
    with torch.device("meta"):
        return GPT(config)


def next_token_logits(model: nn.Module, tokens: Tensor) -> Tensor:
    """Logits of a GPT or of a Hugging Face model, (batch, time, vocabulary), float32."""
    output = model(tokens)
    logits: Tensor = output if isinstance(output, Tensor) else output.logits
    return logits.float()
