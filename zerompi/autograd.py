"""Differentiable collectives: functions of a tensor on every rank that return new tensors.

The differentiated scalar is the SUM of the losses of all ranks, not their mean: after `backward` a
rank's gradient says how the sum of all losses changes with this rank's tensor. So the gradient of

* `all_gather` is a `reduce_scatter` (sum),
* `reduce_scatter` is an `all_gather`,
* `all_reduce` is an `all_reduce`,
* `all_to_all` is an `all_to_all`,
* `broadcast` is the sum over ranks on the root, and zero elsewhere.

Divide each rank's loss by the number of ranks to differentiate the mean. Double backward works: the
gradients are made of these functions themselves.

Backward communicates. Every rank runs it, through the same collectives in the same order; autograd
does so by itself where all ranks build the same graph. Where the tensor requires a gradient on one
rank, the result requires one on all, so that a rank whose own tensor is a constant takes part in
backward.
A rank whose loss does not depend on the result skips that backward: the others then raise
MismatchError at the next collective at which this rank meets them, or wait for it if there is none.
Add `0 * result.sum()` to the loss of such a rank.

Tensors are on the host or of torch.cuda, of any dense layout; those that are not contiguous are copied first.
Sums are those of `zerompi.collectives.reduce_scatter`: in rank order, narrow dtypes in float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from zerompi import device
from zerompi.arrays import copy_values, require_dense_tensor
from zerompi.collectives import contract
from zerompi.collectives.all_gather import gather_blocks
from zerompi.collectives.all_reduce import reduce_all
from zerompi.collectives.all_to_all import swap_blocks
from zerompi.collectives.broadcast import spread
from zerompi.collectives.group import Group
from zerompi.collectives.reduce import reduce_to_root
from zerompi.collectives.reduce_scatter import reduce_blocks
from zerompi.layout import FlatLayout, Range


def all_gather(tensor: Tensor, group: Group) -> Tensor:
    """The tensors of all ranks, concatenated along dim 0 in rank order.

    Collective: every rank of the group calls this in the same order; so is its backward.

    Args:
        tensor: shape (n, ...), the same on all ranks; any dtype.
        group: the ranks.

    Returns:
        A new tensor of shape (n * size, ...).

    Raises:
        TypeError, ValueError: wrong arguments on this rank, before any communication.
        MismatchError: ranks disagree on shape or dtype or on whether gradients are recorded, or
            another rank's arguments are wrong.
    """
    return _apply(_AllGather, "all_gather", tensor, group, multiple=1)


def reduce_scatter(tensor: Tensor, group: Group, op: str = "sum") -> Tensor:
    """Block r along dim 0 of the sum over ranks, on rank r.

    Collective: every rank of the group calls this in the same order; so is its backward.

    Args:
        tensor: shape (n * size, ...), the same on all ranks; any dtype that has a sum.
        group: the ranks.
        op: "sum" or, for floating-point and complex dtypes, "mean".

    Returns:
        A new tensor of shape (n, ...).

    Raises:
        TypeError, ValueError: wrong arguments on this rank, before any communication.
        MismatchError: as for `all_gather`, or ranks disagree on op.
    """
    return _apply(_ReduceScatter, "reduce_scatter", tensor, group, op=op, multiple=group.size)


def all_reduce(tensor: Tensor, group: Group, op: str = "sum") -> Tensor:
    """The sum over ranks, on all ranks.

    Collective: every rank of the group calls this in the same order; so is its backward.

    Args:
        tensor: any shape, the same on all ranks; any dtype that has a sum.
        group: the ranks.
        op: "sum" or, for floating-point and complex dtypes, "mean".

    Returns:
        A new tensor of the same shape.

    Raises:
        TypeError, ValueError: wrong arguments on this rank, before any communication.
        MismatchError: as for `all_gather`, or ranks disagree on op.
    """
    return _apply(_AllReduce, "all_reduce", tensor, group, op=op)


def all_to_all(tensor: Tensor, group: Group) -> Tensor:
    """Block r along dim 0 goes to rank r; block r of the result comes from rank r.

    Collective: every rank of the group calls this in the same order; so is its backward.

    Args:
        tensor: shape (n * size, ...), the same on all ranks; any dtype.
        group: the ranks.

    Returns:
        A new tensor of the same shape.

    Raises:
        TypeError, ValueError: wrong arguments on this rank, before any communication.
        MismatchError: as for `all_gather`.
    """
    return _apply(_AllToAll, "all_to_all", tensor, group, multiple=group.size)


def broadcast(tensor: Tensor, group: Group, root: int = 0) -> Tensor:
    """The root's tensor, on all ranks.

    Collective: every rank of the group calls this in the same order; so is its backward.

    Args:
        tensor: any shape and dtype, the same on all ranks; the values are read on the root only.
        group: the ranks.
        root: rank whose values all get.

    Returns:
        A new tensor of the same shape.

    Raises:
        TypeError, ValueError: wrong arguments on this rank, before any communication.
        MismatchError: as for `all_gather`, or ranks disagree on root.
    """
    return _apply(_Broadcast, "broadcast", tensor, group, root=root)


# -- before communication ----------------------------------------------------------------------


def _apply(
    function: Any,
    operation: str,
    tensor: Tensor,
    group: Group,
    *,
    multiple: int | None = None,
    **settings: Any,
) -> Tensor:
    """Check, agree, and run an autograd function; `multiple` is what the length of dim 0 must be divisible by."""

    def check() -> str:
        require_dense_tensor("tensor", tensor)
        if multiple is not None:
            _require_blocks(tensor, multiple)
        if "op" in settings:
            contract.require_op(settings["op"], tensor.dtype)
        if "root" in settings:
            contract.require_root(settings["root"], group)
        recorded = "recorded" if torch.is_grad_enabled() else "not recorded"
        return contract.signature(
            f"differentiable {operation}",
            tensor,
            shape=tuple(tensor.shape),
            gradients=recorded,
            **settings,
        )

    needed = torch.is_grad_enabled() and isinstance(tensor, Tensor) and tensor.requires_grad
    flags = contract.agreed_signature(group, operation, check, int(needed))
    source = tensor.contiguous().resolve_conj().resolve_neg()
    if any(flags) and not needed:
        source = source.detach().requires_grad_()
    result: Tensor = function.apply(source, group, *settings.values())
    return result


def _require_blocks(tensor: Tensor, multiple: int) -> None:
    if tensor.dim() == 0:
        raise ValueError("tensor: expected at least one dimension, got none")
    if tensor.shape[0] % multiple:
        raise ValueError(
            f"tensor: expected a multiple of {multiple} along dim 0, got shape {tuple(tensor.shape)}"
        )


def _equal_blocks(numel: int, group: Group) -> tuple[Range, ...]:
    return FlatLayout([(numel,)], group.size).shard_ranges


def _empty(like: Tensor, shape: Sequence[int]) -> Tensor:
    """A new tensor in the memory in which `like` lies."""
    space = device.space_of(like)
    if like.is_cuda or not space.is_device:
        return like.new_empty(shape)
    return device.allocate(math.prod(shape), like.dtype, space).view(shape)


# -- the functions of autograd -----------------------------------------------------------------


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Group) -> Tensor:
        ctx.group = group
        result = _empty(tensor, (tensor.shape[0] * group.size, *tensor.shape[1:]))
        full = result.view(-1)
        ranges = _equal_blocks(full.numel(), group)
        copy_values(full[slice(*ranges[group.rank])], tensor.detach().view(-1))
        gather_blocks(full, ranges, group)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return reduce_scatter(gradients[0], ctx.group), None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Group, op: str) -> Tensor:
        ctx.group, ctx.op = group, op
        result = _empty(tensor, (tensor.shape[0] // group.size, *tensor.shape[1:]))
        full = tensor.detach().view(-1)
        ranges = _equal_blocks(full.numel(), group)
        reduce_blocks(full, result.view(-1), ranges, group, scale=contract.scale_of(op, group))
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        gathered = all_gather(gradients[0], ctx.group)
        if ctx.op == "mean":
            gathered = gathered * contract.scale_of(ctx.op, ctx.group)
        return gathered, None, None


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Group, op: str) -> Tensor:
        ctx.group, ctx.op = group, op
        result = _empty(tensor, tensor.shape).copy_(tensor.detach())
        full = result.view(-1)
        ranges = _equal_blocks(full.numel(), group)
        reduce_all(full, ranges, group, scale=contract.scale_of(op, group))
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return all_reduce(gradients[0], ctx.group, ctx.op), None, None


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Group) -> Tensor:
        ctx.group = group
        result = _empty(tensor, tensor.shape)
        swap_blocks(tensor.detach().view(-1), result.view(-1), group)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return all_to_all(gradients[0], ctx.group), None


class _Broadcast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Group, root: int) -> Tensor:
        ctx.group, ctx.root = group, root
        result = _empty(tensor, tensor.shape)
        if group.rank == root:
            copy_values(result.view(-1), tensor.detach().view(-1))
        spread(result.view(-1), group, root)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        reduced = _apply(_Reduce, "reduce", gradients[0], ctx.group, root=ctx.root)
        return reduced, None, None


class _Reduce(torch.autograd.Function):
    """The sum over ranks on the root, zero elsewhere: the adjoint of broadcast."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Group, root: int) -> Tensor:
        ctx.group, ctx.root = group, root
        result = _empty(tensor, tensor.shape).copy_(tensor.detach())
        reduce_to_root(result.view(-1), group, root)
        return result if group.rank == root else result.zero_()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return broadcast(gradients[0], ctx.group, ctx.root), None, None
