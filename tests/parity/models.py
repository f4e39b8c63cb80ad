"""Small models of every kind, and the unsharded training that a partition is compared with."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from mpi4py import MPI
from torch import Tensor, nn
from torch.optim import Optimizer

import zerompi
from harness.memory import ON_DEVICE

GLOBAL_BATCH = 12  # divides by 1, 2, 3 and 4 ranks
STEPS = 5 if ON_DEVICE else 20  # an emulated device takes its time
Batch = tuple[Tensor, Tensor]


def one_each(comm: MPI.Intracomm) -> zerompi.Topology:
    """A layout in which every rank is a node: nothing is shared, and everything moves."""
    return zerompi.Topology(comm, ranks_per_node=1)


class Block(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim)
        # A bias of the keys has no effect on the softmax: Adam would scale its rounding errors up.
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.up = nn.Linear(dim, 4 * dim)
        self.down = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = (
            part.view(b, t, self.heads, d // self.heads).transpose(1, 2)
            for part in self.qkv(self.norm1(x)).split(d, 2)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).reshape(b, t, d))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    def __init__(self, *, tied: bool = False, dim: int = 20, vocab: int = 31) -> None:
        super().__init__()
        self.token = nn.Embedding(vocab, dim)
        self.position = nn.Parameter(torch.randn(9, dim) * 0.02)
        self.blocks = nn.ModuleList(Block(dim, 2) for _ in range(3))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, vocab, bias=False)
        if tied:
            self.head.weight = self.token.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.position[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class MLP(nn.Module):
    """Layers whose sizes divide by no number of ranks, a scalar and an empty parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(7, 13), nn.Tanh(), nn.Linear(13, 5), nn.Tanh(), nn.Linear(5, 3)
        )
        self.gain = nn.Parameter(torch.tensor(1.5))
        self.empty = nn.Parameter(torch.zeros(0, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x) * self.gain + self.empty.sum()


class CNN(nn.Module):
    """Convolutions with buffers: frozen batch norm statistics and a running mean of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 5, 3), nn.BatchNorm2d(5).eval(), nn.ReLU(inplace=True),
            nn.Conv2d(5, 6, 3, stride=2), nn.GroupNorm(2, 6), nn.ReLU(inplace=True),
        )  # fmt: skip
        self.head = nn.Linear(6 * 8, 10)
        self.register_buffer("scale", torch.full((6 * 8,), 0.5))

    def train(self, mode: bool = True) -> CNN:
        super().train(mode)
        self.features[1].eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).flatten(1) * self.scale)


class LoRALinear(nn.Module):
    def __init__(self, inner: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.inner = inner
        self.inner.requires_grad_(False)
        self.a = nn.Parameter(torch.randn(rank, inner.in_features) * 0.1)
        self.b = nn.Parameter(torch.randn(inner.out_features, rank) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + x @ self.a.T @ self.b.T


def lora_gpt() -> GPT:
    model = GPT()
    model.requires_grad_(False)
    for block in model.blocks:
        block.qkv = LoRALinear(block.qkv)
        block.down = LoRALinear(block.down)
    return model


def token_batch(step: int) -> Batch:
    generator = torch.Generator().manual_seed(100 + step)
    tokens = torch.randint(0, 31, (GLOBAL_BATCH, 9), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]


def vector_batch(step: int) -> Batch:
    generator = torch.Generator().manual_seed(200 + step)
    return (
        torch.randn(GLOBAL_BATCH, 7, generator=generator),
        torch.randn(GLOBAL_BATCH, 3, generator=generator),
    )


def image_batch(step: int) -> Batch:
    generator = torch.Generator().manual_seed(300 + step)
    return (
        torch.randn(GLOBAL_BATCH, 1, 8, 12, generator=generator)[..., :11],
        torch.randint(0, 10, (GLOBAL_BATCH,), generator=generator),
    )


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits.float().flatten(0, -2), target.flatten())


class Case(NamedTuple):
    """A model, its batches and its loss."""

    make: Callable[[], nn.Module]
    batch: Callable[[int], Batch]
    loss: Callable[[Tensor, Tensor], Tensor]


CASES = {
    "gpt": Case(GPT, token_batch, cross_entropy),
    "tied": Case(lambda: GPT(tied=True), token_batch, cross_entropy),
    "mlp": Case(MLP, vector_batch, F.mse_loss),
    "cnn": Case(CNN, image_batch, F.cross_entropy),
    "lora": Case(lora_gpt, token_batch, cross_entropy),
}


def two_groups(parameters: list[nn.Parameter]) -> list[dict[str, object]]:
    matrices = [p for p in parameters if p.ndim >= 2]
    others = [p for p in parameters if p.ndim < 2]
    return [
        {"params": matrices, "weight_decay": 0.1},
        {"params": others, "weight_decay": 0.0, "lr": 5e-4},
    ]


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.1),
    "fused_adamw": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-3),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "two_groups": lambda p: torch.optim.AdamW(two_groups(p), lr=1e-3),
}


def build(case: Case, optimizer: str = "adamw", seed: int = 7) -> tuple[nn.Module, Optimizer]:
    """Model and optimizer, the same for every caller with the same seed."""
    torch.manual_seed(seed)
    model = case.make()
    trainable = [p for p in model.parameters() if p.requires_grad]
    return model, OPTIMIZERS[optimizer](trainable)


@cache
def unsharded_losses(
    case: Case, optimizer: str = "adamw", steps: int = STEPS, clip: float | None = None
) -> tuple[list[float], nn.Module]:
    """Losses of plain torch on the global batch, and the trained model: computed once, to be read."""
    model, opt = build(case, optimizer)
    losses = []
    for step in range(steps):
        x, y = case.batch(step)
        loss = case.loss(model(x), y)
        loss.backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        opt.step()
        opt.zero_grad()
        losses.append(loss.item())
    return losses, model


def own_slice(batch: Batch, rank: int, size: int) -> Batch:
    """The rank's part of a global batch."""
    n = GLOBAL_BATCH // size
    x, y = batch
    return x[rank * n : (rank + 1) * n], y[rank * n : (rank + 1) * n]


def step(
    comm: MPI.Intracomm, case: Case, model: nn.Module, optimizer: Optimizer, number: int = 0
) -> float:
    """One step on this rank's part of a batch; return its loss."""
    x, y = own_slice(case.batch(number), comm.rank, comm.size)
    loss = case.loss(model(x), y)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def assert_same_weights(
    state: dict[str, Tensor], reference: nn.Module, rtol: float = 1e-4, atol: float = 1e-5
) -> None:
    """A full state dict has the weights of the unsharded model."""
    for key, value in reference.state_dict().items():
        torch.testing.assert_close(state[key], value, rtol=rtol, atol=atol)
