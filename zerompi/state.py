"""What of a partition goes into a checkpoint, and how it comes back."""

from __future__ import annotations

import base64
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from zerompi.checkpoint import CheckpointReader, Slice, TensorSpec, TensorTable
from zerompi.errors import ZerompiError
from zerompi.optimizer import is_elementwise_shape, is_elementwise_state
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
    piece = entry.segment.layout.piece(entry.position, entry.segment.shard_index)
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
    return {"param_groups": groups, "values": values}


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) else value


# -- reading -----------------------------------------------------------------------------------


def check_model(
    reader: CheckpointReader, model: nn.Module, units: Sequence[Unit], aliases: Mapping[str, str]
) -> None:
    """Refuse a checkpoint whose tensors are not the model's, before anything is overwritten.

    Raises:
        ZerompiError: tensors are missing, unexpected or of another shape; all are named.
    """
    shapes = {name: spec.shape for name, spec in reader.model_specs.items()}
    check_names("the checkpoint", shapes, model, units, aliases)


def check_names(
    what: str,
    shapes: Mapping[str, Sequence[int]],
    model: nn.Module,
    units: Sequence[Unit],
    aliases: Mapping[str, str],
) -> None:
    """Refuse names and shapes that are not those of the model's state dict.

    Raises:
        ZerompiError: `what` lacks tensors, has unexpected ones, or some of another shape.
    """
    expected = {entry.name: entry.shape for entry in entries(units)}
    expected.update({name: tuple(b.shape) for name, b in persistent_buffers(model).items()})
    found = {aliases.get(name, name): tuple(shape) for name, shape in shapes.items()}
    problems = []
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected]
    if missing:
        problems.append(f"missing: {_listed(missing)}")
    if unexpected:
        problems.append(f"unexpected: {_listed(unexpected)}")
    problems += [
        f"{name}: expected shape {shape}, got {found[name]}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
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


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(names[:8]) + more


def read_model(
    reader: CheckpointReader, model: nn.Module, units: Sequence[Unit], aliases: Mapping[str, str]
) -> None:
    """Read this rank's slices of the main weights, and all buffers."""
    stored = {aliases.get(name, name): name for name in reader.model_specs}
    for entry in entries(units):
        name, segment = stored[entry.name], entry.segment
        piece = entry.piece.detach()
        if piece.shape == entry.shape and segment.is_main_replicated:
            reader.read_model(name, 0, piece.numel(), piece.reshape(-1))
        else:
            (start, stop), values = segment.own_values(entry.position)
            reader.read_model(name, start, stop, values)
    for name, buffer in persistent_buffers(model).items():
        values = torch.empty(buffer.numel(), dtype=buffer.dtype)
        reader.read_model(stored[name], 0, buffer.numel(), values)
        buffer.detach().copy_(values.view(buffer.shape))


def check_optimizer_state(
    reader: CheckpointReader, optimizer: Optimizer, units: Sequence[Unit]
) -> None:
    """Refuse a checkpoint whose param groups are not the optimizer's, before anything is overwritten.

    Raises:
        ZerompiError: other groups, or state of parameters that the model has not.
    """
    names = {id(entry.piece): entry.name for entry in entries(units)}
    ours = [[names[id(piece)] for piece in group["params"]] for group in optimizer.param_groups]
    plain = reader.state.get("optimizer", {})
    theirs = [list(group["parameters"]) for group in plain.get("param_groups", [])]
    if ours != theirs:
        raise ZerompiError(
            f"the checkpoint's optimizer has {len(theirs)} param groups with "
            f"{[len(group) for group in theirs]} parameters, this one {len(ours)} with "
            f"{[len(group) for group in ours]}: expected the same parameters in the same groups"
        )
    known = set(names.values())
    for full_name in [*reader.optimizer_specs, *plain.get("values", {})]:
        _, _, name = full_name.partition(".")
        if name not in known:
            raise ZerompiError(
                f"the checkpoint has optimizer state for {name!r}, the model has not"
            )


def read_optimizer(reader: CheckpointReader, optimizer: Optimizer, units: Sequence[Unit]) -> None:
    """Replace the optimizer's state and settings by the checkpoint's, this rank's slices only."""
    by_name = {entry.name: entry for entry in entries(units)}
    plain = reader.state.get("optimizer", {})
    for group, settings in zip(optimizer.param_groups, plain["param_groups"], strict=True):
        _read_group(group, settings)
    states: dict[Tensor, dict[str, Any]] = {}
    for full_name, spec in reader.optimizer_specs.items():
        key, _, name = full_name.partition(".")
        if name not in by_name:
            raise ZerompiError(
                f"the checkpoint has optimizer state for {name!r}, the model has not"
            )
        entry = by_name[name]
        if is_elementwise_shape(key, spec.shape, entry.shape):
            value = torch.empty_like(entry.piece, dtype=spec.dtype, requires_grad=False)
            start, stop = _own_range(entry)
            reader.read_optimizer(full_name, start, stop, value.view(-1))
        else:
            value = torch.empty(1, dtype=spec.dtype)
            reader.read_optimizer(full_name, 0, 1, value)
            value = value.view(())
        states.setdefault(entry.piece, {})[key] = value
    for full_name, plain_value in plain.get("values", {}).items():
        key, _, name = full_name.partition(".")
        states.setdefault(by_name[name].piece, {})[key] = plain_value
    optimizer.state.clear()
    optimizer.state.update(states)


def _own_range(entry: Entry) -> tuple[int, int]:
    if entry.segment.is_main_replicated:
        return 0, entry.piece.numel()
    return entry.segment.layout.piece(entry.position, entry.segment.shard_index).in_parameter


def _read_group(group: dict[str, Any], settings: Mapping[str, Any]) -> None:
    for key, value in settings.items():
        if key == "parameters":
            continue
        if isinstance(group.get(key), Tensor):
            group[key].fill_(value)
        elif isinstance(group.get(key), tuple):
            group[key] = tuple(value)
        else:
            group[key] = value


# -- random number generators ------------------------------------------------------------------


def rng_state() -> dict[str, Any]:
    """The state of torch's, NumPy's and Python's global generators, for JSON."""
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    version, words, next_gauss = random.getstate()
    return {
        "torch": base64.b64encode(bytes(torch.get_rng_state().numpy())).decode(),
        "numpy": [
            name,
            base64.b64encode(np.asarray(keys).tobytes()).decode(),
            position,
            has_gauss,
            gauss,
        ],
        "python": [version, list(words), next_gauss],
    }


def set_rng_state(state: Mapping[str, Any]) -> None:
    """The reverse of `rng_state`."""
    raw = bytearray(base64.b64decode(state["torch"]))
    torch.set_rng_state(torch.frombuffer(raw, dtype=torch.uint8))
    name, keys, position, has_gauss, gauss = state["numpy"]
    words = np.frombuffer(base64.b64decode(keys), dtype=np.uint32)
    np.random.set_state((name, words, position, has_gauss, gauss))
    version, python_words, next_gauss = state["python"]
    random.setstate((version, tuple(python_words), next_gauss))
