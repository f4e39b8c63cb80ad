"""Numbers that every rank can compute for every rank, layouts of ranks, and sums as documented."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from torch import Tensor

from harness.memory import ON_DEVICE
from zerompi.collectives import Group
from zerompi.dtypes import accumulate_dtype
from zerompi.traffic import INTER_GROUP, INTER_NODE

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch.empty(0, dtype=torch.complex32)  # torch warns once that it is experimental

# "by messages": the ranks of a node share no memory. "|": between groups of nodes.
LAYOUTS = [
    "flat",
    "flat by messages",
    "one node",
    "2+2",
    "2+2 by messages",
    "3+1",
    "3+1 by messages",
    "1+3",
    "1+2",
    "1+2 by messages",
    "2+1",
    "1+1",
    "1+1+1+1",
    "0,1,0,1",
    "1+1|1+1",
    "1+1+1|1",
    "2+1|1",
    "2+1|1 by messages",
    "1|1+1",
]

PLAIN_DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
    torch.bfloat16,
    torch.float16,
    torch.float32,
    torch.float64,
    torch.complex32,
    torch.complex64,
    torch.complex128,
]
ALL_DTYPES = sorted(
    {
        dtype
        for dtype in vars(torch).values()
        if isinstance(dtype, torch.dtype) and not str(dtype).startswith(("torch.q", "torch.quint"))
    },
    key=str,
)
NUMPY_DTYPES = ["?", "b", "B", "h", "H", "i", "I", "q", "Q", "e", "f", "d", "F", "D"]


def raw(dtype: torch.dtype, numel: int, rank: int) -> Tensor:
    """Random bytes as `dtype`, NaN and infinity among them."""
    generator = torch.Generator().manual_seed(1000 * rank + numel)
    data = torch.randint(0, 256, (numel * dtype.itemsize,), dtype=torch.uint8, generator=generator)
    if dtype is torch.bool:
        data %= 2
    return data.view(dtype)


def numbers(dtype: torch.dtype, numel: int, rank: int) -> Tensor:
    """Random numbers whose sum over a few ranks depends on the order and on the accumulator."""
    generator = torch.Generator().manual_seed(1000 * rank + numel)
    if dtype is torch.bool:
        return torch.randint(0, 2, (numel,), generator=generator).bool()
    values = torch.randn(numel, dtype=torch.float64, generator=generator) * 10
    if dtype.is_complex:
        return torch.complex(values, values.flip(0)).to(dtype)
    if dtype.is_floating_point:
        return values.to(dtype)
    return values.abs().to(torch.int64).to(dtype)


def as_bytes(array: object) -> bytes:
    """The memory of an array or tensor."""
    if isinstance(array, np.ndarray):
        return array.tobytes()
    return array.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def plain_sum(summands: list[Tensor], scale: float = 1.0) -> Tensor:
    """First to last in the accumulator's dtype, scaled there, rounded once."""
    dtype = summands[0].dtype
    if dtype in (torch.uint16, torch.uint32, torch.uint64):
        total = sum(summand.numpy() for summand in summands)
        return torch.from_numpy(np.asarray(total))
    if dtype is torch.bool:
        return torch.stack(summands).any(0)
    total = summands[0].to(accumulate_dtype(dtype))
    for summand in summands[1:]:
        total = total + summand.to(total.dtype)
    return (total * scale if scale != 1.0 else total).to(dtype)


def reads_neighbours(group: Group) -> bool:
    """Whether ranks of a node read each other's blocks, so that no message is sent inside it."""
    return (group.transport().node if ON_DEVICE else group.node) is not None


def between_nodes(group: Group, label: str) -> int:
    """Bytes that this rank has sent to other nodes, of its own group of nodes or another."""
    return sum(group.traffic.total(label, level) for level in (INTER_NODE, INTER_GROUP))


def documented_sum(summands: list[Tensor], group: Group, scale: float = 1.0) -> Tensor:
    """Flat: ranks ascending. Hierarchical: ranks of a node, rounded, then nodes of a group, then groups."""
    if group.algorithm == "flat":
        return plain_sum(summands, scale)
    layout = group.topology
    of_node = [plain_sum([summands[r] for r in ranks], scale) for ranks in layout.ranks_of_node]
    return plain_sum([plain_sum([of_node[n] for n in nodes]) for nodes in layout.nodes_of_group])
