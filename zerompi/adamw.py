"""AdamW whose step on a device is one kernel for each stretch of adjacent memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from zerompi import device
from zerompi.blocked_step import cut
from zerompi.gradient_norms import continues, joined
from zerompi.kernels.adamw import Hyperparameters, Shard, launch_adamw

_STATES = ("exp_avg", "exp_avg_sq")


class AdamW(torch.optim.AdamW):
    """`torch.optim.AdamW`, with its arguments, param groups and state.

    float32 parameters in device memory are stepped by a fused kernel, in torch's order of operations: one
    launch for all neighbours in memory, such as a partition's pieces of one unit and param group. Their
    states are flat, too. All others, and those of groups with `amsgrad`, `maximize`, `capturable`,
    `differentiable`, `foreach` or `fused`, are stepped by torch; on the host in parts (`blocked_step.py`).
    """

    def _init_group(self, group: dict[str, Any], *lists: list[Tensor]) -> bool:
        """Step what the kernel can; give torch the rest of the group."""
        mine = [p for p in group["params"] if _is_ours(p)] if _has_kernel(group) else []
        for run in self._runs(mine):
            self._step_together(run, group)
        stepped = set(map(id, mine))
        rest = [p for p in group["params"] if id(p) not in stepped]
        has_complex = super()._init_group({**group, "params": rest}, *lists)  # type: ignore[no-untyped-call]
        cut(group, lists)
        return bool(has_complex)

    def _runs(self, parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
        """Parameters whose values and gradients are neighbours, and that are at the same step."""
        run: list[Tensor] = []
        for parameter in sorted(parameters, key=Tensor.data_ptr):
            if run and not self._is_next(run[-1], parameter):
                yield run
                run = []
            run.append(parameter)
        if run:
            yield run

    def _is_next(self, first: Tensor, second: Tensor) -> bool:
        assert first.grad is not None
        assert second.grad is not None
        if not (continues(first, second) and continues(first.grad, second.grad)):
            return False
        return self._step_of(first) == self._step_of(second)

    def _step_of(self, parameter: Tensor) -> int:
        return int(self.state[parameter].get("step", 0))

    def _step_together(self, run: Sequence[Tensor], group: dict[str, Any]) -> None:
        step = self._step_of(run[0]) + 1
        for parameter in run:
            self.state[parameter]["step"] = torch.tensor(float(step), dtype=torch.float32)
        states = [self._flat_state(run, key) for key in _STATES]
        hyper = Hyperparameters(
            lr=float(group["lr"]),
            betas=tuple(map(float, group["betas"])),  # type: ignore[arg-type]
            eps=group["eps"],
            weight_decay=group["weight_decay"],
        )
        weights = joined(run)[0]
        gradient = joined([p.grad for p in run if p.grad is not None])[0]
        with device.beside(weights):
            launch_adamw(Shard(*map(device.as_cupy, (weights, gradient, *states))), hyper, step)

    def _flat_state(self, run: Sequence[Tensor], key: str) -> Tensor:
        """A state of all of them, 1-D; what lies elsewhere, or nowhere, is brought together."""
        parts = [self.state[parameter].get(key) for parameter in run]
        if all(part is not None and device.holds(part) for part in parts):
            flats = joined(parts)
            if len(flats) == 1:
                return flats[0]
        sizes = [parameter.numel() for parameter in run]
        flat = device.allocate(sum(sizes), torch.float32, device.space_of(run[0])).zero_()
        for parameter, part, place in zip(run, parts, flat.split(sizes), strict=True):
            if part is not None:
                place.copy_(part.reshape(-1))
            self.state[parameter][key] = place.view(parameter.shape)
        return flat


def _has_kernel(group: dict[str, Any]) -> bool:
    others = ("amsgrad", "maximize", "capturable", "differentiable", "foreach", "fused")
    return device.is_installed() and not any(group[name] for name in others)


def _is_ours(parameter: Tensor) -> bool:
    gradient = parameter.grad
    if gradient is None or not parameter.numel():
        return False
    return all(
        tensor.dtype is torch.float32
        and tensor.layout is torch.strided
        and tensor.is_contiguous()
        and device.holds(tensor)
        for tensor in (parameter, gradient)
    )
