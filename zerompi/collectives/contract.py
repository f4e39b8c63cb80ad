"""Contracts of the public collectives, checked on every rank before any data moves."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

import torch

from zerompi import device
from zerompi.collectives.group import Group
from zerompi.dtypes import accumulate_dtype
from zerompi.errors import MismatchError
from zerompi.memory import DeviceArray, Flat


class Call(NamedTuple):
    """A checked call: flat buffers, and what all ranks must have in common."""

    send: Flat
    recv: Flat
    signature: str


def agreed(group: Group, operation: str, check: Callable[[], Call]) -> Call:
    """Run `check` on every rank and make sure that all ranks call the same. Collective."""
    calls: list[Call] = []

    def signature() -> str:
        calls.append(check())
        return calls[0].signature

    agreed_signature(group, operation, signature)
    return calls[0]


def agreed_signature(
    group: Group, operation: str, check: Callable[[], str], flags: int = 0
) -> tuple[int, ...]:
    """Run `check` on every rank, compare what it returns, and exchange flags. Collective.

    A rank whose arguments are wrong raises what its check raised, while the others get a
    MismatchError that tells which rank refused and why. Nobody waits.
    """
    if not isinstance(group, Group):
        raise TypeError(f"group: expected a zerompi.collectives.Group, got {type(group).__name__}")
    try:
        text = check()
    except Exception as error:
        with suppress(MismatchError):
            group.agree(f"refusal of {operation}: {error}")
        raise
    return group.agree(text, flags)


def signature(operation: str, flat: Flat, **settings: object) -> str:
    """What must be equal on all ranks."""
    extra = "".join(f", {name}={value}" for name, value in settings.items())
    if _is_of_device(flat):
        extra += ", on a device"
    return f"{operation} ({flat.dtype}, {flat.numel()} elements{extra})"


def _is_of_device(flat: Flat) -> bool:
    return isinstance(flat, DeviceArray) or device.holds(flat)


def require_alike(send: Flat, recv: Flat) -> None:
    """Refuse buffers of different dtypes, or of which one lies on a device."""
    if isinstance(send, DeviceArray) is not isinstance(recv, DeviceArray):
        places = ["on the host", "on a device"]
        if isinstance(send, DeviceArray):
            places.reverse()
        raise ValueError(f"recv: expected memory {places[0]}, as send has, got memory {places[1]}")
    if send.dtype is not recv.dtype:
        raise TypeError(f"recv: expected the dtype of send, {send.dtype}, got {recv.dtype}")


def require_numel(name: str, tensor: Flat, expected: int, reason: str) -> None:
    """Refuse a buffer of another size."""
    if tensor.numel() != expected:
        raise ValueError(f"{name}: expected {expected} elements ({reason}), got {tensor.numel()}")


def require_op(op: str, dtype: torch.dtype) -> None:
    """Refuse reductions other than sum and mean, and those that `dtype` does not have."""
    if op not in ("sum", "mean"):
        raise ValueError(f"op: expected 'sum' or 'mean', got {op!r}")
    accumulate_dtype(dtype)
    if op == "mean" and not (dtype.is_floating_point or dtype.is_complex):
        raise TypeError(
            f"op: expected 'sum' for {dtype}, whose mean has no exact value, got 'mean'"
        )


def require_root(root: int, group: Group) -> None:
    """Refuse a root that is no rank of the group."""
    if isinstance(root, bool) or not isinstance(root, int) or not 0 <= root < group.size:
        raise ValueError(f"root: expected a rank from 0 to {group.size - 1}, got {root!r}")


def scale_of(op: str, group: Group) -> float:
    """What the sum over ranks is multiplied with."""
    return 1.0 / group.size if op == "mean" else 1.0


def same_memory(a: Flat, b: Flat) -> bool:
    """Whether two contiguous buffers are the same memory."""
    return a.data_ptr() == b.data_ptr() and a.nbytes == b.nbytes


def require_disjoint(send: Flat, recv: Flat, in_place: str) -> None:
    """Refuse buffers that overlap; `in_place` tells which form is allowed. Empty ones never do."""
    if (
        send.nbytes
        and recv.nbytes
        and send.data_ptr() < recv.data_ptr() + recv.nbytes
        and recv.data_ptr() < send.data_ptr() + send.nbytes
    ):
        raise ValueError(f"recv: expected memory apart from send, or {in_place}, got an overlap")
