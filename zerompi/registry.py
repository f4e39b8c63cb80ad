"""Which parameters belong to a partition, so that no optimizer steps them behind its back."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.weak import WeakIdKeyDictionary

from zerompi.errors import ZerompiError

_names = WeakIdKeyDictionary()


def register(names: Iterable[tuple[str, nn.Parameter]]) -> None:
    """Note the model's own parameters, by name, of a partition."""
    _watch_optimizers()
    for name, parameter in names:
        _names[parameter] = name


def forget(parameters: Iterable[nn.Parameter]) -> None:
    """The partition of these parameters is closed."""
    for parameter in parameters:
        _names.pop(parameter, None)


def is_partitioned(parameter: nn.Parameter) -> bool:
    """Whether a partition that is not closed holds this parameter."""
    return parameter in _names


@cache
def _watch_optimizers() -> None:
    register_optimizer_step_pre_hook(_refuse_model_parameters)


def _refuse_model_parameters(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """The gradients and main weights are in the pieces: a step of the model's own would do nothing."""
    for number, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            if parameter in _names:
                raise ZerompiError(
                    f"param group {number} of {type(optimizer).__name__} holds {_names[parameter]} of a "
                    "partitioned model, which would not be trained: give all parameters to one "
                    "optimizer before zerompi.partition"
                )
