"""How a checkpoint comes back into a partition: all of it is read and verified, then all is taken over.

A rank reads its own pieces into memory of their own, which takes as much as its pieces do, and only
when all ranks have theirs does anything change. Gradients, which training needs, take more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from zerompi.checkpoint import CheckpointReader
from zerompi.errors import CheckpointError, ZerompiError
from zerompi.generators import Install, prepare_states, states_of_rank
from zerompi.optimizer import is_elementwise_shape
from zerompi.parts import Parts
from zerompi.state import Entry, Match, entries, listed, match_names, persistent_buffers
from zerompi.state import refuse_problems as refuse
from zerompi.unit import Unit

# Which kernel steps: the program's choice, not the checkpoint's, which may be of another device.
_KERNEL_SETTINGS = ("fused", "foreach", "capturable")


@dataclass
class Plan:
    """What of a checkpoint is going to be loaded.

    Attributes:
        match: names of weights and buffers.
        takes_groups: whether the settings of the param groups are the checkpoint's.
        states: names of the parameters whose optimizer state is the checkpoint's; None leaves the
            optimizer alone.
        problems: of the optimizer, one sentence each.
    """

    match: Match
    takes_groups: bool = True
    states: set[str] | None = None
    problems: list[str] = field(default_factory=list)

    @property
    def skipped(self) -> list[str]:
        """What is not loaded, and why."""
        return self.match.problems + self.problems


@dataclass
class Restoration:
    """All that a checkpoint brings, verified."""

    copies: list[tuple[Tensor, Tensor]]
    groups: list[tuple[dict[str, Any], dict[str, Any]]]
    states: dict[Tensor, dict[str, Any]] | None
    generators: list[Install]
    scaler: dict[str, float] | None
    extra: dict[str, Any]

    def apply(self, parts: Parts) -> None:
        """Take it over; memory is given back on the way."""
        while self.copies:
            destination, values = self.copies.pop()
            destination.copy_(values)
        for group, settings in self.groups:
            for key, value in settings.items():
                if isinstance(group.get(key), Tensor):
                    group[key].fill_(value)
                else:
                    group[key] = value
        if parts.optimizer is not None and self.states is not None:
            take_states(parts.optimizer, self.states)
        if parts.scaler is not None and self.scaler is not None:
            parts.scaler.load_state_dict(self.scaler)
        for install in self.generators:
            install()


def take_states(optimizer: Optimizer, states: Mapping[Tensor, Mapping[str, Any]]) -> None:
    """Give `optimizer` states, each where torch keeps it: with its piece.

    Step counts are on the host, but where a kernel on the device reads them.
    """
    counted_there = {
        id(piece)
        for group in optimizer.param_groups
        if group.get("fused") or group.get("capturable")
        for piece in group["params"]
    }
    optimizer.state.clear()
    for piece, values in states.items():
        optimizer.state[piece] = {
            key: value.to(piece.device)
            if isinstance(value, Tensor) and (key != "step" or id(piece) in counted_there)
            else value
            for key, value in values.items()
        }


# -- names -------------------------------------------------------------------------------------


def plan(reader: CheckpointReader, parts: Parts, *, strict: bool) -> Plan:
    """Compare the checkpoint with the model and the optimizer; nothing is read yet.

    Raises:
        ZerompiError: with `strict`: they do not match; all differences are named.
        CheckpointError: `state.json` makes no sense.
    """
    shapes = {name: spec.shape for name, spec in reader.model_specs.items()}
    found = Plan(match_names(shapes, parts.model, parts.units, parts.aliases))
    if strict:
        refuse("the checkpoint", found.match.problems)
    if parts.optimizer is not None and reader.state:
        try:
            _plan_optimizer(reader, parts.optimizer, parts.units, found)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise _senseless(reader, "optimizer", error) from error
    if strict and found.problems:
        raise ZerompiError("; ".join(found.problems[:20]))
    return found


def _senseless(reader: CheckpointReader, what: str, error: Exception) -> CheckpointError:
    return CheckpointError(f"{reader.path / 'state.json'}: {what}: makes no sense: {error!r}")


def _plan_optimizer(
    reader: CheckpointReader, optimizer: Optimizer, units: Sequence[Unit], found: Plan
) -> None:
    saved: Mapping[str, Any] = reader.state.get("optimizer", {})
    kind, own_kind = saved.get("class"), type(optimizer).__name__
    if kind is not None and kind != own_kind:
        found.problems.append(f"the checkpoint's optimizer is {kind}, this one {own_kind}")
        return
    names = {id(entry.piece): entry.name for entry in entries(units)}
    ours = [[names[id(piece)] for piece in group["params"]] for group in optimizer.param_groups]
    theirs = [[str(n) for n in group["parameters"]] for group in saved.get("param_groups", [])]
    if ours != theirs:
        found.takes_groups = False
        found.problems.append(_difference(ours, theirs))
    by_name = {entry.name: entry for entry in entries(units)}
    found.states, unusable = set(), set()
    stored = [(name, spec.shape) for name, spec in reader.optimizer_specs.items()]
    for full_name, shape in [*stored, *((name, ()) for name in saved.get("values", {}))]:
        key, _, name = full_name.partition(".")
        problem = _state_problem(key, name, shape, by_name)
        if problem is None:
            found.states.add(name)
        else:
            unusable.add(name)
            found.problems.append(problem)
    found.states -= unusable


def _difference(ours: Sequence[Sequence[str]], theirs: Sequence[Sequence[str]]) -> str:
    text = (
        f"the checkpoint's optimizer has {len(theirs)} param groups with "
        f"{[len(group) for group in theirs]} parameters, this one {len(ours)} with "
        f"{[len(group) for group in ours]}: expected the same parameters in the same groups"
    )
    of_ours = {name for group in ours for name in group}
    of_theirs = {name for group in theirs for name in group}
    for word, names in (("missing", of_ours - of_theirs), ("unexpected", of_theirs - of_ours)):
        if names:
            text += f"; {word}: {listed(sorted(names))}"
    return text


def _state_problem(
    key: str, name: str, shape: tuple[int, ...], by_name: Mapping[str, Entry]
) -> str | None:
    if name not in by_name:
        return f"the checkpoint has optimizer state for {name!r}, the model has not"
    expected = by_name[name].shape
    if shape == expected or shape in ((), (1,)):
        return None
    return f"{key}.{name}: expected shape {expected} or a scalar, got {shape}"


# -- values ------------------------------------------------------------------------------------


def read(reader: CheckpointReader, parts: Parts, found: Plan) -> Restoration:
    """Read and verify this rank's part of everything; nothing is changed.

    Raises:
        CheckpointError: something is damaged, or `state.json` makes no sense.
    """
    state = reader.state
    world = parts.context.world
    rng, extra = state.get("rng") or [], state.get("extra") or {}
    if not isinstance(extra, dict):
        raise CheckpointError(f"{reader.path / 'state.json'}: extra: expected an object")
    copies = _read_model(reader, parts, found.match)
    groups: list[tuple[dict[str, Any], dict[str, Any]]] = []
    states: dict[Tensor, dict[str, Any]] | None = None
    try:
        generators = prepare_states(states_of_rank(rng, world.rank, world.size))
        scaler = _scaler_state(state.get("loss_scaler"))
        if parts.optimizer is not None and found.states is not None:
            states = _read_states(reader, parts.units, found.states)
            if found.takes_groups:
                groups = _settings(parts.optimizer, state["optimizer"]["param_groups"])
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise _senseless(reader, "rng, loss_scaler or optimizer", error) from error
    return Restoration(copies, groups, states, generators, scaler, extra)


def _read_model(
    reader: CheckpointReader, parts: Parts, match: Match
) -> list[tuple[Tensor, Tensor]]:
    copies = []
    for entry in entries(parts.units):
        if entry.name not in match.stored:
            continue
        if entry.segment.is_main_replicated:
            start, stop, own = 0, entry.piece.numel(), entry.piece.detach().view(-1)
        else:
            (start, stop), own = entry.segment.own_values(entry.position)
        values = torch.empty(own.shape, dtype=own.dtype)
        reader.read_model(match.stored[entry.name], start, stop, values)
        copies.append((own, values))
    for name, buffer in persistent_buffers(parts.model).items():
        if name in match.stored:
            values = torch.empty(buffer.numel(), dtype=buffer.dtype)
            reader.read_model(match.stored[name], 0, buffer.numel(), values)
            copies.append((buffer.detach(), values.view(buffer.shape)))
    return copies


def _read_states(
    reader: CheckpointReader, units: Sequence[Unit], wanted: set[str]
) -> dict[Tensor, dict[str, Any]]:
    by_name = {entry.name: entry for entry in entries(units)}
    states: dict[Tensor, dict[str, Any]] = {}
    for full_name, spec in reader.optimizer_specs.items():
        key, _, name = full_name.partition(".")
        if name not in wanted:
            continue
        entry = by_name[name]
        if is_elementwise_shape(key, spec.shape, entry.shape):
            value = torch.empty(entry.piece.shape, dtype=spec.dtype)
            start, stop = _own_range(entry)
            reader.read_optimizer(full_name, start, stop, value.view(-1))
        else:
            value = torch.empty(1, dtype=spec.dtype)
            reader.read_optimizer(full_name, 0, 1, value)
            value = value.view(())
        states.setdefault(entry.piece, {})[key] = value
    for full_name, plain_value in reader.state.get("optimizer", {}).get("values", {}).items():
        key, _, name = full_name.partition(".")
        if name in wanted:
            states.setdefault(by_name[name].piece, {})[key] = plain_value
    return states


def _own_range(entry: Entry) -> tuple[int, int]:
    if entry.segment.is_main_replicated:
        return 0, entry.piece.numel()
    return entry.segment.owned[entry.position].in_parameter


def _settings(
    optimizer: Optimizer, saved: Sequence[Mapping[str, Any]]
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The param groups, and what is to be set in them."""
    pairs = []
    for group, settings in zip(optimizer.param_groups, saved, strict=True):
        chosen: dict[str, Any] = {}
        for key, value in settings.items():
            if isinstance(group.get(key), Tensor):
                chosen[key] = float(value)
            elif isinstance(group.get(key), tuple):
                chosen[key] = tuple(value)
            elif key not in ("parameters", "params", *_KERNEL_SETTINGS):
                chosen[key] = value
        pairs.append((group, chosen))
    return pairs


def _scaler_state(saved: Mapping[str, Any] | None) -> dict[str, float] | None:
    if not saved:
        return None
    return {
        "scale": float(saved["scale"]),
        "steps_since_overflow": int(saved["steps_since_overflow"]),
    }
