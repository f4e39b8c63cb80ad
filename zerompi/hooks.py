"""When things happen: hooks on modules, tensors and parameters drive the units.

    forward                       backward
    -------                       --------
    before: unshard               gradient of an output arrives: unshard
    run the module                gradient of a parameter is complete: collect it into the bucket,
    after: reshard                    reduce the unit when it has all
                                  a saved parameter is needed: unshard (saved.py)
                                  gradients of the inputs are complete: reshard
                                  end of backward: reduce what is left, reshard what nobody holds

Autograd runs nodes in the reverse order of their creation. The inputs of a unit pass through a node
that is created before any other of its forward, so when that node runs, the unit's backward is
over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from zerompi.activity import progress
from zerompi.buffers import ModuleBuffers
from zerompi.context import Context
from zerompi.errors import ZerompiError
from zerompi.nested import iter_tensors, map_arguments, map_tensors
from zerompi.precision import LossScaler
from zerompi.saved import SavedParameters
from zerompi.schedule import Accumulation, Gathers, Reductions
from zerompi.segment import Segment
from zerompi.unit import Unit, UnitState


def in_backward() -> bool:
    """Whether the calling thread runs a backward pass (a recomputed forward is in one)."""
    return torch._C._current_graph_task_id() != -1


class Hooks:
    """Registers the hooks of one partition; `remove` takes them away again."""

    def __init__(
        self,
        model: nn.Module,
        units: Sequence[Unit],
        context: Context,
        scaler: LossScaler | None,
    ) -> None:
        self.model = model
        self.units = units
        self.context = context
        self.scaler = scaler
        self.accumulation = Accumulation(context)
        self.gathers = Gathers(context)
        self.reductions = Reductions(units, context)
        self.buffers = ModuleBuffers(model, context.world, context.attendance)
        self._sharded = not all(unit.is_resident for unit in units)
        self._end_is_queued = False
        self._kept: list[Unit] = []
        self._owner = {id(p): unit for unit in units for s in unit.segments for p in s.parameters}
        # Per unit, for each of its running forwards, whether it saves tensors through us.
        self._running: dict[Unit, list[bool]] = {unit: [] for unit in units}
        # Per unit, how many of its forwards have not had their backward in the next backward pass.
        self._open = dict.fromkeys(units, 0)
        self._saved = {unit: SavedParameters([unit], self._before_use) for unit in units}
        self._is_scaled = False
        self._handles: list[RemovableHandle] = []
        for unit in units:
            self._register(unit)
        if self._sharded:
            self._watch_modules()

    def _register(self, unit: Unit) -> None:
        for segment in unit.trainable:
            for index, parameter in enumerate(segment.parameters):
                self._handles.append(
                    parameter.register_post_accumulate_grad_hook(
                        partial(self._on_gradient, unit, segment, index)
                    )
                )
        before: Callable[..., Any] = self._before_forward
        after: Callable[..., Any] = self._after_forward
        if unit.module is self.model:
            before, after = self._before_model, self._after_model
        elif not self._sharded:
            return
        self._handles.append(
            unit.module.register_forward_pre_hook(
                partial(before, unit), prepend=True, with_kwargs=True
            )
        )
        self._handles.append(
            unit.module.register_forward_hook(partial(after, unit), always_call=True)
        )

    @contextmanager
    def saved_parameters(self, units: Sequence[Unit]) -> Iterator[None]:
        """Parameters of `units` that autograd saves meanwhile are gathered again when it needs them."""
        if not self._sharded:
            yield
            return
        saved = SavedParameters(units, self._before_use)
        saved.push()
        try:
            yield
        finally:
            saved.pop()

    def _watch_modules(self) -> None:
        """Notice modules that are called while their parameters are not here."""
        for name, module in self.model.named_modules():
            own = module._parameters.values()
            owners = {self._owner[id(parameter)] for parameter in own if parameter is not None}
            owners = {unit for unit in owners if unit.module is not module}
            if owners:
                self._handles.append(
                    module.register_forward_pre_hook(
                        partial(self._refuse_outside, name, sorted(owners, key=self.units.index)),
                        prepend=True,
                    )
                )

    def _refuse_outside(
        self, name: str, owners: Sequence[Unit], module: nn.Module, args: tuple[Any, ...]
    ) -> None:
        for unit in owners:
            if unit.is_hidden:
                raise ZerompiError(
                    f"{name} was called outside the forward of {unit.name}, which gathers its "
                    "parameters: call that module, make a unit of this one (units=), or use "
                    "zero.gathered()"
                )

    def remove(self) -> None:
        """Take all hooks away."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def gradient_scale(self) -> float:
        """What a sum of gradients is multiplied by: the mean over ranks and passes, and no loss scale.

        Collective if passes are weighted.
        """
        divisor = self.accumulation.divisor()
        if self.scaler is not None:
            divisor *= self.scaler.scale
        return 1.0 / divisor

    # -- forward -------------------------------------------------------------------------------

    def _before_forward(
        self, unit: Unit, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        saves = self._sharded and torch.is_grad_enabled()
        self._running[unit].append(False)
        unit.holds += 1
        self.gathers.unshard(unit)
        if not saves:
            return None
        self._saved[unit].push()
        self._running[unit][-1] = True

        inputs: list[Tensor] = []

        def mark(tensor: Tensor) -> Tensor:
            if not tensor.requires_grad:
                return tensor
            inputs.append(tensor.view_as(tensor))
            return inputs[-1]

        args, kwargs = map_arguments(mark, args, kwargs)
        self._await_backward(unit, inputs)
        return args, kwargs

    def _await_backward(self, unit: Unit, inputs: Sequence[Tensor]) -> None:
        """Notice when the gradients of a forward's inputs have come: its backward is over then."""
        is_recomputed = in_backward() and self._open[unit] > 0  # the graph that counts has hooks
        if inputs and not is_recomputed:
            self._open[unit] += 1
        missing = len(inputs)

        def on_gradient(gradient: Tensor) -> None:
            nonlocal missing
            missing -= 1
            unit.reshard()
            if missing == 0 and not is_recomputed:
                self._open[unit] -= 1
                self._after_backward(unit)

        for tensor in inputs:
            tensor.register_hook(on_gradient)

    def _after_forward(
        self, unit: Unit, module: nn.Module, args: tuple[Any, ...], output: Any
    ) -> Any:
        if not self._running[unit]:
            return output  # called although a hook before ours has refused the forward
        if self._running[unit].pop():
            self._saved[unit].pop()
        unit.holds -= 1
        if self._sharded and output is not None:
            output = map_tensors(partial(_own_memory, unit), output)
            if torch.is_grad_enabled():
                for tensor in iter_tensors(output):
                    if tensor.requires_grad:
                        tensor.register_hook(partial(self._before_backward, unit))
        if not in_backward():
            self.gathers.reshard(unit, expect_next=output is not None)
        return output

    def _before_model(
        self, unit: Unit, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if not in_backward():
            progress.phase = "forward"
            if any(unit.is_hidden for unit in self.units):
                self.gathers.begin(with_grad=torch.is_grad_enabled())
            else:  # inside gathered(), where a rank may do what it likes
                self.context.settle()
        if torch.is_grad_enabled() and not in_backward():
            self._check_phase()
            if self.model.training:
                self.buffers.synchronise()
        dtype = self.context.precision.param_dtype

        def prepare(tensor: Tensor) -> Tensor:
            if dtype is not None and tensor.is_floating_point():
                tensor = tensor.to(dtype)
            if self.scaler is not None and tensor.requires_grad:
                # Gradients leave the model unscaled, whatever they flow into.
                tensor = tensor.view_as(tensor)
                tensor.register_hook(lambda gradient: gradient / self.scaler.scale)
            return tensor

        args, kwargs = map_tensors(prepare, args), map_tensors(prepare, kwargs)
        return self._before_forward(unit, module, args, kwargs) or (args, kwargs)

    def _after_model(
        self, unit: Unit, module: nn.Module, args: tuple[Any, ...], output: Any
    ) -> Any:
        output = self._after_forward(unit, module, args, output)
        dtype = self.context.precision.output_dtype

        def finish(tensor: Tensor) -> Tensor:
            if dtype is not None and tensor.is_floating_point():
                tensor = tensor.to(dtype)
            if tensor.requires_grad:
                tensor.register_hook(self._scale_gradient)
            return tensor

        return map_tensors(finish, output)

    def _check_phase(self) -> None:
        """Refuse what would be silently wrong; forget a backward pass that an exception ended."""
        if self._end_is_queued:
            self._end_is_queued = False
            self.discard_gradients()
        for name, parameter in self.model.named_parameters():
            if id(parameter) not in self._owner:
                raise ZerompiError(
                    f"{name} was not in the model when it was partitioned: change the model before "
                    "zerompi.partition"
                )
        for unit in self.units:
            visible = unit.state is UnitState.UNSHARDED
            for segment in unit.segments:
                if not segment.trainable and any(p.requires_grad for p in segment.parameters):
                    raise ZerompiError(
                        f"parameters of {unit.name} were frozen when the model was partitioned and "
                        "require a gradient now: set requires_grad before zerompi.partition"
                    )
                name_of_changed = segment.changed()
                if name_of_changed is not None:
                    raise ZerompiError(
                        f"{name_of_changed} was changed in place, once by each rank, but the ranks of "
                        "a node have one copy of it together: change it inside "
                        "zero.gathered(writable=True)"
                    )
                name_of_replaced = segment.replaced(visible=visible)
                if name_of_replaced is not None:
                    raise ZerompiError(
                        f"somebody has replaced the data of {name_of_replaced} (model.to, .half, "
                        "parameter.data = ...): do so before zerompi.partition, or inside "
                        "zero.gathered(writable=True)"
                    )

    def discard_gradients(self) -> None:
        """Forget all gradients that are not reduced yet."""
        self._is_scaled = False
        self.reductions.reset()
        for unit in self.units:
            self._open[unit] = 0
            unit.discard_gradients()
        self.accumulation.forget()

    # -- backward ------------------------------------------------------------------------------

    def _scale_gradient(self, gradient: Tensor) -> Tensor | None:
        self._queue_end()
        self._is_scaled = True
        return None if self.scaler is None else gradient * self.scaler.scale

    def _before_backward(self, unit: Unit, gradient: Tensor) -> None:
        self._queue_end()
        self.gathers.unshard(unit)
        self._keep(unit)

    def _keep(self, unit: Unit) -> None:
        """With create_graph=True the graph of this backward pass will read the parameters again."""
        if torch.is_grad_enabled() and unit not in self._kept:
            unit.holds += 1
            self._kept.append(unit)

    def _before_use(self, unit: Unit) -> None:
        """A saved parameter is needed: in a backward pass, or because somebody looks at the graph."""
        if in_backward():
            self._queue_end()
        self.gathers.unshard(unit)
        if in_backward():
            self._keep(unit)

    def _after_backward(self, unit: Unit) -> None:
        """A backward of the unit is over; if it was the last, no gradient is to be expected any more.

        Not even of parameters that this rank has not used, as another one may have. Where units are
        gathered, the others reduce this one before they gather the next.
        """
        if self._open[unit] <= 0 and unit.trainable and self.accumulation.communicates:
            self.reductions.ready(unit, self.gradient_scale)

    def _on_gradient(
        self, unit: Unit, segment: Segment, index: int, parameter: nn.Parameter
    ) -> None:
        self._queue_end()
        if self.scaler is not None and not self._is_scaled:
            raise ZerompiError(
                f"{segment.names[index]} got a gradient that did not come through the model's output, "
                "where the loss scale is applied: compute the loss from what model(...) returns"
            )
        unit.settle()  # a gradient that comes late starts another reduction
        segment.gradients.collect(index, self.accumulation.factor)
        if self.accumulation.communicates and unit.is_complete:
            self.reductions.ready(unit, self.gradient_scale)

    def _queue_end(self) -> None:
        if not self._end_is_queued:
            self._end_is_queued = True
            progress.phase = "backward"
            torch.autograd.Variable._execution_engine.queue_callback(self._end_of_backward)

    def _end_of_backward(self) -> None:
        self._end_is_queued = False
        if torch.is_grad_enabled() and self._kept:
            return  # a pass with create_graph=True only prepared another one
        self.release_kept()
        collected = any(
            segment.gradients.collected for unit in self.units for segment in unit.trainable
        )
        for unit in self.units:
            unit.reshard()
        reduces = self.accumulation.communicates
        if reduces:
            self.reductions.finish(self.gradient_scale)
        self._is_scaled = False
        if collected:
            self.accumulation.end_pass()
        if reduces:
            self.accumulation.forget()
        for unit in self.units:
            self._open[unit] = 0
            for segment in unit.trainable:
                segment.gradients.collected = 0
        progress.phase = "after backward"
        self.measure_gradients()

    def release_kept(self) -> None:
        """Let go of the parameters that a graph of a double backward has kept."""
        for unit in self._kept:
            unit.holds -= 1
            unit.reshard()
        self._kept.clear()

    def measure_gradients(self) -> None:
        """Bring the gradients' entry of the memory ledger up to date."""
        nbytes = sum(s.gradients.nbytes for unit in self.units for s in unit.trainable)
        self.context.memory.set("gradients", nbytes)


def _own_memory(unit: Unit, tensor: Tensor) -> Tensor:
    """A copy of an output that lies in the unit's parameters, which are about to be freed."""
    is_ours = any(segment.covers(tensor) for segment in unit.segments)
    return tensor.clone() if is_ours else tensor
