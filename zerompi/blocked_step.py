"""Cache blocking of Adam's step on the host.

torch steps one parameter after the other, with a dozen operations that each go through its values, gradient and
states. What is larger than a core's share of the cache comes from memory each time, and goes back. The operations
treat each element by itself, so torch gets large parameters of float32 and float64 in parts: the same operations
on the same numbers, and the same bits. (Those of 16-bit floats depend on where torch's threads divide them.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adam, AdamW, Optimizer

_PART_NUMEL = 128 << 10  # for each thread; with states and a temporary some 2.5 MiB of float32
_NUM_LISTS = 6  # parameters, gradients, three states of each, step counts


def block(optimizer: Optimizer) -> Callable[[], None]:
    """Let torch's own Adam or AdamW step in parts; return what undoes it. Others stay as they are."""
    if type(optimizer) not in (Adam, AdamW) or "_init_group" in vars(optimizer):
        return lambda: None
    own: Callable[..., bool] = optimizer._init_group  # type: ignore[attr-defined]

    def init_group(group: dict[str, Any], *lists: Any) -> bool:
        has_complex = own(group, *lists)
        cut(group, lists)
        return has_complex

    vars(optimizer)["_init_group"] = init_group
    return lambda: vars(optimizer).pop("_init_group", None)


def cut(group: dict[str, Any], lists: Sequence[Any]) -> None:
    """Cut what `_init_group` of torch's Adam has collected for one step, in place.

    Args:
        group: the param group; steps with `foreach`, `fused`, `capturable` or `differentiable` are
            torch's alone.
        lists: its arguments, among them lists of parameters, gradients and states, and last of step
            counts; a list may be empty.
    """
    others = ("foreach", "fused", "capturable", "differentiable")
    if any(group.get(name) for name in others) or torch.compiler.is_compiling():
        return
    lists = [tensors for tensors in lists if isinstance(tensors, list)]
    if len(lists) != _NUM_LISTS or not lists[0]:
        return
    *filled, steps = [tensors for tensors in lists if tensors]
    if len(set(map(id, steps))) < len(steps):
        return  # a parameter is stepped twice, or two count their steps together
    numel = _PART_NUMEL * torch.get_num_threads()
    rows = []
    for *tensors, step in zip(*filled, steps, strict=True):
        if tensors[0].numel() > numel and all(map(_may_be_cut, tensors)):
            columns = [tensor.detach().view(-1).split(numel) for tensor in tensors]
            counts = [step, *(step.clone() for _ in columns[0][1:])]  # each is counted up by torch
            rows += list(zip(*columns, counts, strict=True))
        else:
            rows.append((*tensors, step))
    for tensors, column in zip([*filled, steps], zip(*rows, strict=True), strict=True):
        tensors[:] = column


def _may_be_cut(tensor: Tensor) -> bool:
    return (
        type(tensor) in (Tensor, torch.nn.Parameter)
        and tensor.device.type == "cpu"
        and tensor.layout is torch.strided
        and tensor.is_contiguous()
        and tensor.dtype in (torch.float32, torch.float64)
    )
