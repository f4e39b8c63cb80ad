"""What of a partition goes into a checkpoint; restore.py has the way back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.optim import Optimizer

from zerompi.checkpoint import Slice, TensorSpec, TensorTable
from zerompi.errors import ZerompiError
from zerompi.optimizer import is_elementwise_state
from zerompi.segment import Segment
from zerompi.unit import Unit


class Entry(NamedTuple):
    """One parameter of the model."""

    name: str
    segment: Segment
    position: int

    @property
    def shape(self) -> tuple[int, ...]:
        """The whole parameter's shape."""
        return self.segment.layout.shapes[self.position]

    @property
    def parameter(self) -> nn.Parameter:
        """The model's own parameter."""
        return self.segment.parameters[self.position]

    @property
    def piece(self) -> nn.Parameter:
        """This rank's piece."""
        return self.segment.pieces[self.position]


def entries(units: Sequence[Unit]) -> Iterator[Entry]:
    """All parameters, each once, in the same order on all ranks."""
    for unit in units:
        for segment in unit.segments:
            for position, name in enumerate(segment.names):
                yield Entry(name, segment, position)


def persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that belong to the model's state dict."""
    return {
        f"{prefix}.{key}" if prefix else key: buffer
        for prefix, module in model.named_modules()
        for key, buffer in module._buffers.items()
        if buffer is not None and key not in module._non_persistent_buffers_set
    }


# -- tables for writing ------------------------------------------------------------------------


def model_table(model: nn.Module, units: Sequence[Unit]) -> TensorTable:
    """Main weights and persistent buffers: all names, and this rank's slices of them."""
    specs, slices = {}, []
    for entry in entries(units):
        specs[entry.name] = TensorSpec(entry.shape, entry.segment.main_dtype)
        (start, stop), values = entry.segment.own_values(entry.position)
        slices.append(Slice(entry.name, start, stop, values))
    for name, buffer in persistent_buffers(model).items():
        specs[name] = TensorSpec(tuple(buffer.shape), buffer.dtype)
        if units[0].context.world.rank == 0:
            flat = buffer.detach().reshape(-1)
            slices.append(Slice(name, 0, flat.numel(), flat))
    return TensorTable(specs, _of_first_replica(units, slices))


def optimizer_table(optimizer: Optimizer | None, units: Sequence[Unit]) -> TensorTable:
    """Tensors of the optimizer's state as `<state>.<parameter name>`."""
    specs: dict[str, TensorSpec] = {}
    slices: list[Slice] = []
    if optimizer is None:
        return TensorTable(specs, slices)
    for entry in entries(units):
        for key, value in optimizer.state.get(entry.piece, {}).items():
            if not isinstance(value, Tensor):
                continue
            name = f"{key}.{entry.name}"
            if is_elementwise_state(key, value, entry.piece.shape):
                specs[name] = TensorSpec(entry.shape, value.dtype)
                (start, stop), own = _own_state(entry, value)
                slices.append(Slice(name, start, stop, own))
            elif value.numel() == 1:
                specs[name] = TensorSpec((), value.dtype)
                if units[0].context.world.rank == 0:
                    slices.append(Slice(name, 0, 1, value.reshape(-1)))
            else:
                raise ZerompiError(
                    f"optimizer state {key!r} of {entry.name} has shape {tuple(value.shape)}: "
                    "expected the parameter's shape or a scalar"
                )
    return TensorTable(specs, _of_first_replica(units, slices))


def _own_state(entry: Entry, value: Tensor) -> tuple[tuple[int, int], Tensor]:
    piece = entry.segment.owned[entry.position]
    flat = value.reshape(-1)
    if flat.numel() != piece.in_parameter.numel:  # replicated: every rank writes a part
        flat = flat[piece.in_parameter.start : piece.in_parameter.stop]
    return piece.in_parameter, flat


def _of_first_replica(units: Sequence[Unit], slices: list[Slice]) -> list[Slice]:
    replicas = units[0].context.replica_group
    return slices if replicas is None or replicas.rank == 0 else []


def plain_optimizer_state(optimizer: Optimizer | None, units: Sequence[Unit]) -> dict[str, Any]:
    """Settings of the param groups and the state values that are no tensors, for JSON."""
    if optimizer is None:
        return {}
    names = {id(entry.piece): entry.name for entry in entries(units)}
    groups = []
    for group in optimizer.param_groups:
        settings = {key: _plain(value) for key, value in group.items() if key != "params"}
        groups.append({**settings, "parameters": [names[id(p)] for p in group["params"]]})
    values = {
        f"{key}.{names[id(piece)]}": value
        for piece, state in optimizer.state.items()
        for key, value in state.items()
        if not isinstance(value, Tensor)
    }
    return {"class": type(optimizer).__name__, "param_groups": groups, "values": values}


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) else value


# -- names -------------------------------------------------------------------------------------


class Match(NamedTuple):
    """Which tensors of a state dict are the model's.

    Attributes:
        stored: the model's name -> the state dict's, for those of the same shape.
        problems: what is missing, unexpected or of another shape, one sentence each.
    """

    stored: dict[str, str]
    problems: list[str]


def match_names(
    shapes: Mapping[str, Sequence[int]],
    model: nn.Module,
    units: Sequence[Unit],
    aliases: Mapping[str, str],
) -> Match:
    """Compare the names and shapes of a state dict with those of the model's."""
    expected = {entry.name: entry.shape for entry in entries(units)}
    expected.update({name: tuple(b.shape) for name, b in persistent_buffers(model).items()})
    stored = {aliases.get(name, name): name for name in shapes}
    problems = []
    missing = [name for name in expected if name not in stored]
    unexpected = [name for name in stored if name not in expected]
    if missing:
        problems.append(f"missing: {listed(missing)}")
    if unexpected:
        problems.append(f"unexpected: {listed(unexpected)}")
    matching = {}
    for name, shape in expected.items():
        if name in stored:
            found = tuple(shapes[stored[name]])
            if found == shape:
                matching[name] = stored[name]
            else:
                problems.append(f"{name}: expected shape {shape}, got {found}")
    return Match(matching, problems)


def refuse_problems(what: str, problems: Sequence[str]) -> None:
    """Raise if there are any.

    Raises:
        ZerompiError: `what` lacks tensors, has unexpected ones, or some of another shape.
    """
    if problems:
        raise ZerompiError(f"{what} is not of this model: " + "; ".join(problems[:20]))


def aliases(model: nn.Module, units: Sequence[Unit]) -> dict[str, str]:
    """Other names of tied parameters -> the name under which they are kept."""
    kept = {id(entry.parameter): entry.name for entry in entries(units)}
    return {
        name: kept[id(parameter)]
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if name != kept[id(parameter)]
    }


def listed(names: Sequence[str]) -> str:
    """The first of many names."""
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(names[:8]) + more
