"""Memory of a partition by category, as measured and by the formula of the ZeRO paper."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor
from torch.optim import Optimizer

from zerompi.context import Context
from zerompi.report import ElementBytes, MemoryReport, zero_formula
from zerompi.unit import Unit


def memory_report(
    units: Sequence[Unit], optimizer: Optimizer | None, context: Context
) -> MemoryReport:
    """What the ledger says, and what the formula says for these units and this optimizer."""
    measure_parameters(units, context)
    ledger = context.memory
    return MemoryReport(dict(ledger.now), dict(ledger.peak), _formula(units, optimizer, context))


class MessageBytes(NamedTuple):
    """Bytes of all parameters, and of all gradients, as messages have them: quantized or not."""

    parameters: int
    gradients: int


def message_nbytes(units: Sequence[Unit]) -> MessageBytes:
    """What one gather of all parameters and one reduction of all gradients have to move.

    Of quantized ones, each shard is packed by itself, with its scales.
    """
    parameters = gradients = 0
    for unit in units:
        for segment in unit.segments:
            parameters += segment.packed_nbytes(segment.weight_code, segment.dtype)
            if segment.trainable:
                code = segment.gradients.packer.code if segment.gradients.packer else None
                gradients += segment.packed_nbytes(code, segment.gradients.dtype)
    return MessageBytes(parameters, gradients)


def measure_parameters(units: Sequence[Unit], context: Context) -> None:
    """Bring the parameters' entry of the memory ledger up to date."""
    nbytes = sum(segment.parameter_nbytes for unit in units for segment in unit.segments)
    context.memory.set("parameters", nbytes)


def _formula(
    units: Sequence[Unit], optimizer: Optimizer | None, context: Context
) -> dict[str, float]:
    total = dict.fromkeys(("parameters", "gradients", "optimizer_states"), 0.0)
    tensors_per_element = _state_tensors_per_element(optimizer)
    for unit in units:
        for segment in unit.segments:
            separate = segment.main_dtype is not segment.dtype
            state_bytes = segment.main_dtype.itemsize * (tensors_per_element + separate)
            per_element = ElementBytes(
                parameter=segment.dtype.itemsize,
                gradient=segment.gradients.dtype.itemsize if segment.trainable else 0,
                optimizer_state=state_bytes if segment.trainable else 0,
            )
            group = context.shard_group
            part = zero_formula(
                segment.layout.numel,
                group.size,
                context.stage,
                per_element,
                group.node_comm.size if segment.is_node_copy else 1,
            )
            for category, nbytes in part.items():
                total[category] += nbytes
    return total


def _state_tensors_per_element(optimizer: Optimizer | None) -> int:
    """How many elementwise states the optimizer keeps (2 for Adam); 0 before its first step."""
    if optimizer is None or not optimizer.state:
        return 0
    piece, state = max(optimizer.state.items(), key=lambda item: item[0].numel())
    return sum(isinstance(value, Tensor) and value.shape == piece.shape for value in state.values())
