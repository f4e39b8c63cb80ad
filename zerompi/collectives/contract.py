"""Contracts of the public collectives, checked on every rank before any data moves."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

from torch import Tensor

from zerompi.collectives.group import Group
from zerompi.errors import MismatchError


class Call(NamedTuple):
    """A checked call: flat tensors, and what all ranks must have in common."""

    send: Tensor
    recv: Tensor
    signature: str


def agreed(group: Group, operation: str, check: Callable[[], Call]) -> Call:
    """Run `check` on every rank and make sure that all ranks call the same. Collective.

    A rank whose arguments are wrong raises its TypeError or ValueError, while the others get a
    MismatchError that tells which rank refused and why. Nobody waits.
    """
    if not isinstance(group, Group):
        raise TypeError(f"group: expected a zerompi.collectives.Group, got {type(group).__name__}")
    try:
        call = check()
    except (TypeError, ValueError) as error:
        with suppress(MismatchError):
            group.agree(f"refusal of {operation}: {error}")
        raise
    group.agree(call.signature)
    return call


def signature(operation: str, tensor: Tensor, **settings: object) -> str:
    """What must be equal on all ranks."""
    extra = "".join(f", {name}={value}" for name, value in settings.items())
    return f"{operation} ({tensor.dtype}, {tensor.numel()} elements{extra})"


def require_equal_dtype(send: Tensor, recv: Tensor) -> None:
    """Refuse buffers of different dtypes."""
    if send.dtype is not recv.dtype:
        raise TypeError(f"recv: expected the dtype of send, {send.dtype}, got {recv.dtype}")


def require_numel(name: str, tensor: Tensor, expected: int, reason: str) -> None:
    """Refuse a buffer of another size."""
    if tensor.numel() != expected:
        raise ValueError(f"{name}: expected {expected} elements ({reason}), got {tensor.numel()}")


def require_op(op: str) -> None:
    """Refuse reductions other than sum and mean."""
    if op not in ("sum", "mean"):
        raise ValueError(f"op: expected 'sum' or 'mean', got {op!r}")


def same_memory(a: Tensor, b: Tensor) -> bool:
    """Whether two contiguous tensors are the same memory."""
    return a.data_ptr() == b.data_ptr() and a.nbytes == b.nbytes


def require_disjoint(send: Tensor, recv: Tensor, in_place: str) -> None:
    """Refuse buffers that overlap; `in_place` tells which form is allowed."""
    if send.data_ptr() < recv.data_ptr() + recv.nbytes and (
        recv.data_ptr() < send.data_ptr() + send.nbytes
    ):
        raise ValueError(f"recv: expected memory apart from send, or {in_place}, got an overlap")
