"""Linear layers whose backward makes the weight's gradient where it is collected: in the bucket.

Autograd makes a gradient in memory of its own, and `Gradients.collect` copies it into the bucket. For
the weights of linear layers, which are most of a model, the matrix product can as well write it there:
as gradient accumulation fusion does in Megatron-LM, only that nothing is added. It is the product that
torch computes, with operands of the same layout, and so the same to the bit. (BLAS libraries may sum in
another order where the result begins at an odd address: there it is copied as before.)

What the product is written to is lent by `Gradients.lend`, and only while autograd is about to
accumulate it: not for `torch.autograd.grad`, whose result is the caller's, not where the graph of
the backward pass is recorded, not where somebody's hook may keep the gradient. Everything else is
torch's own: calls without gradients, under autocast, of tensor subclasses, traced, transformed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zerompi.gradients import Gradients
from zerompi.unit import Unit

# A smaller gradient is copied sooner than Python has run a function of autograd.
_MIN_NBYTES = 1 << 19

_TORCH_LINEAR: Any = torch._C._nn.linear


class DirectLinear:
    """Stands in for the forward of one linear layer on the host, until `remove`.

    Args:
        module: the layer.
        gradients: where its weight's gradient is collected, as that of parameter `index`.
    """

    def __init__(self, module: nn.Linear, gradients: Gradients, index: int) -> None:
        self._module = module
        self._weight = module.weight
        self._gradients = gradients
        self._index = index
        self._is_removed = False
        module.forward = self.forward  # type: ignore[method-assign]

    def remove(self) -> None:
        """Give the layer its own forward back; whoever has wrapped ours gets that, too."""
        self._is_removed = True
        if vars(self._module).get("forward") == self.forward:
            del self._module.forward

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (torch's name)
        """What `nn.Linear.forward` does."""
        module = self._module
        if (
            torch.is_grad_enabled()
            and not self._is_removed
            and module.weight is self._weight
            and self._weight.requires_grad
            and _is_plain(input)
            and input.dtype is self._weight.dtype
            and input.dim() >= 2
            and input.is_contiguous()
            and not _is_intercepted()
        ):
            apply: Any = _Linear.apply
            output: Tensor = apply(input, self._weight, module.bias, self)
            return output
        return nn.Linear.forward(module, input)

    def lend(self) -> Tensor | None:
        """Where the weight's gradient may be written, if anywhere; autograd is about to accumulate it."""
        hooks: Any = self._weight._post_accumulate_grad_hooks
        if self._is_removed or self._weight._backward_hooks or len(hooks or ()) != 1:
            return None  # a hook that is not ours may keep it
        return self._gradients.lend(self._index)


def install(model: nn.Module, units: Sequence[Unit]) -> Iterator[DirectLinear]:
    """Let the linear layers of `model` write gradients into the buckets of `units`, where it pays."""
    places = {
        id(parameter): (segment.gradients, index)
        for unit in units
        for segment in unit.trainable
        if segment.dtype.is_floating_point
        and segment.dtype is segment.gradients.dtype
        and not segment.context.shard_group.space.is_device
        for index, parameter in enumerate(segment.parameters)
        if parameter.numel() * segment.dtype.itemsize >= _MIN_NBYTES
    }
    for module in model.modules():
        if not isinstance(module, nn.Linear) or "forward" in vars(module):
            continue
        place = places.get(id(module._parameters.get("weight")))
        if place is not None and type(module).forward is nn.Linear.forward:
            yield DirectLinear(module, *place)


def _is_plain(tensor: object) -> bool:
    return type(tensor) is Tensor and tensor.layout is torch.strided and tensor.device.type == "cpu"


def _is_intercepted() -> bool:
    """Whether somebody else looks at, replaces, casts, transforms or traces this thread's operations."""
    return bool(
        F.linear is not _TORCH_LINEAR
        or torch.is_autocast_enabled("cpu")
        or torch._C._is_torch_function_mode_enabled()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
        or torch.compiler.is_compiling()
    )


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, layer: DirectLinear
    ) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(x, weight if ctx.needs_input_grad[0] else None)
        output: Tensor = F.linear(x, weight, bias)
        # Of a view that is a function's result, autograd refuses changes in place.
        return torch.ops.aten._unsafe_view(output, output.shape) if output._is_view() else output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        rows = gradients[0].reshape(-1, gradients[0].shape[-1])
        of_x = of_weight = None
        if weight is not None:
            of_x = rows.mm(weight).view(x.shape)
        is_accumulated, is_taken = _use_of(ctx.next_functions[1][0])
        if is_accumulated or is_taken:
            place = None
            if is_accumulated and not torch.is_grad_enabled() and _is_plain(rows):
                place = ctx.layer.lend()
            left, right = rows.t(), x.reshape(-1, x.shape[-1])
            of_weight = left.mm(right) if place is None else torch.mm(left, right, out=place)
        # Autograd sums the bias's gradient over the rows, as it does for torch's own addition of it.
        return of_x, of_weight, rows if ctx.needs_input_grad[2] else None, None


def _use_of(node: Any) -> tuple[bool, bool]:
    """Whether the running backward pass accumulates the gradient of a leaf, or returns it to the caller."""
    try:
        return bool(torch._C._will_engine_execute_node(node)), False
    except RuntimeError:  # torch's way to tell that it is torch.autograd.grad's
        return False, True
