"""Mixed precision: dtypes of parameters, reduction and output, and loss scaling."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

NonFinite = Literal["raise", "skip", "ignore"]  # what a step does whose gradient is not finite


@dataclass(frozen=True)
class MixedPrecision:
    """Dtypes of a partitioned model whose main weights stay float32.

    Attributes:
        param_dtype: dtype of the parameters that forward and backward see; None keeps the
            model's own. Floating-point inputs of the model are cast to it.
        reduce_dtype: dtype in which gradients accumulate, travel and are kept until
            `optimizer.step()`; None is float32. Sums are always accumulated in float32.
        output_dtype: dtype of the model's floating-point outputs; None leaves them.
        loss_scale: "dynamic" scales the loss by a factor that grows while gradients are
            finite and halves when they are not (that step is skipped); a number is a fixed
            scale; None means "dynamic" for float16 parameters and no scaling otherwise.

    Micikevicius et al., "Mixed Precision Training" (arXiv:1710.03740), sections 3.1 and 3.2.
    """

    param_dtype: torch.dtype | None = None
    reduce_dtype: torch.dtype | None = None
    output_dtype: torch.dtype | None = None
    loss_scale: float | Literal["dynamic"] | None = None

    def __post_init__(self) -> None:
        """Refuse dtypes and scales that cannot work."""
        for field in ("param_dtype", "reduce_dtype", "output_dtype"):
            value = getattr(self, field)
            if value is not None and not (
                isinstance(value, torch.dtype) and value.is_floating_point
            ):
                raise TypeError(f"{field}: expected a floating-point torch.dtype, got {value!r}")
        scale = self.loss_scale
        if isinstance(scale, str):
            if scale != "dynamic":
                raise ValueError(f"loss_scale: expected 'dynamic' or a number, got {scale!r}")
        elif scale is not None and (isinstance(scale, bool) or not 0 < scale < math.inf):
            raise ValueError(f"loss_scale: expected a positive number, got {scale!r}")

    def make_scaler(self) -> LossScaler | None:
        """The loss scaler that these settings ask for, or None."""
        scale = self.loss_scale
        if scale is None and self.param_dtype is torch.float16:
            scale = "dynamic"
        if scale is None:
            return None
        if scale == "dynamic":
            return LossScaler()
        return LossScaler(scale=float(scale), dynamic=False)


class LossScaler:
    """The loss scale and its growth: halved at an overflow, doubled after `growth_interval`."""

    def __init__(
        self, scale: float = 2.0**16, *, dynamic: bool = True, growth_interval: int = 2000
    ) -> None:
        self.scale = scale
        self.dynamic = dynamic
        self.growth_interval = growth_interval
        self.steps_since_overflow = 0

    @property
    def explains_overflow(self) -> bool:
        """Whether a gradient that is not finite may be this scale's doing, and a lower one will help."""
        return self.dynamic and self.scale > 1

    def update(self, *, overflow: bool) -> None:
        """Account for one optimizer step."""
        if not self.dynamic:
            return
        if overflow:
            self.scale = max(self.scale / 2, 2.0**-24)
            self.steps_since_overflow = 0
            return
        self.steps_since_overflow += 1
        if self.steps_since_overflow >= self.growth_interval:
            self.scale = max(self.scale, min(self.scale * 2, 2.0**24))
            self.steps_since_overflow = 0

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return {"scale": self.scale, "steps_since_overflow": self.steps_since_overflow}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """The reverse of `state_dict`."""
        self.scale = float(state["scale"])
        self.steps_since_overflow = int(state["steps_since_overflow"])
