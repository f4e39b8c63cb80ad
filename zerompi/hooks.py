"""When things happen: hooks on modules, tensors and parameters drive the units.

    forward                       backward
    -------                       --------
    before: unshard               gradient of an output arrives: unshard
    run the module                gradient of a parameter is complete: collect it into the bucket,
    after the last of the unit:       reduce the unit when it has all
        reshard
                                  a saved parameter is needed: unshard (saved.py)
                                  gradients of the inputs of all its modules are complete: reshard
                                  end of backward: reduce what is left, reshard what nobody holds

Autograd runs nodes in the reverse order of their creation. The inputs of a unit pass through a node
that is created before any other of its forward, so when that node runs, the unit's backward is
over. A unit of several modules stays between them, unless it has to make room (`forwards.py`).
"""

from __future__ import annotations

from collections import OrderedDict
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
from zerompi.forwards import Forwards
from zerompi.nested import map_arguments, map_tensors
from zerompi.precision import LossScaler
from zerompi.saved import SavedParameters
from zerompi.schedule import Accumulation, Gathers, MeanScale, Reductions, Refreshes
from zerompi.segment import Segment
from zerompi.unit import Unit, UnitState

# So many units stay here between the forwards, or backwards, of their modules.
_MAX_IDLE = 4


def in_backward() -> bool:
    """Whether the calling thread runs a backward pass (a recomputed forward is in one)."""
    return torch._C._current_graph_task_id() != -1


def _hook(tensor: Tensor, function: Callable[[Tensor], Tensor | None]) -> None:
    """`tensor.register_hook(function)`, but for the handle, which takes half of the time and nobody needs.

    Here `grad_fn` is asked for first: register_hook crashes on a view whose base was changed in place,
    of which it then has to be made anew (torch 2.13).
    """
    node = tensor.grad_fn
    if node is None or tensor._backward_hooks is not None:
        tensor.register_hook(function)
    else:
        tensor._backward_hooks = OrderedDict([(-1, function)])  # handles count from 0
        node._register_hook_dict(tensor)


class _Awaited:
    """The backward of one forward of a module: over when no gradient of its inputs is missing.

    It is itself the hook of these inputs.

    Args:
        arrived: called with this object when a gradient has come.
        unit, module: whose backward it is.
        is_recomputed: whether another graph of the same forward counts.

    Attributes:
        missing: how many gradients are still to come.
    """

    __slots__ = ("_arrived", "is_recomputed", "missing", "module", "unit")

    def __init__(
        self,
        arrived: Callable[[_Awaited], None],
        unit: Unit,
        module: nn.Module,
        *,
        is_recomputed: bool,
    ) -> None:
        self._arrived = arrived
        self.unit = unit
        self.module = module
        self.missing = 0
        self.is_recomputed = is_recomputed

    def mark(self, tensor: Tensor) -> Tensor:
        """What the module is given instead of an input: if there is a gradient, it is awaited."""
        if not tensor.requires_grad:
            return tensor
        tensor = tensor.view_as(tensor)
        _hook(tensor, self)
        self.missing += 1
        return tensor

    def __call__(self, gradient: Tensor) -> None:
        """A gradient has come."""
        self.missing -= 1
        self._arrived(self)


class Hooks:
    """Registers the hooks of one partition; `remove` takes them away again."""

    def __init__(
        self,
        model: nn.Module,
        units: Sequence[Unit],
        context: Context,
        scaler: LossScaler | None,
        refreshes: Refreshes,
    ) -> None:
        self.model = model
        self.units = units
        self.context = context
        self.scaler = scaler
        self.accumulation = Accumulation(context)
        self.gradient_scale = MeanScale(self.accumulation, scaler)
        self.gathers = Gathers(context)
        self.reductions = Reductions(units, context)
        self.refreshes = refreshes
        self.buffers = ModuleBuffers(model, context.world, context.attendance)
        self._sharded = not all(unit.is_resident for unit in units)
        self._end_is_queued = False
        self._kept: list[Unit] = []
        self._owner = {id(p): unit for unit in units for s in unit.segments for p in s.parameters}
        self._forwards = {unit: Forwards(unit.modules) for unit in units}
        self._idle: dict[Unit, None] = {}  # that wait here for the next of their modules
        self._saved = {unit: SavedParameters([unit], self._before_use) for unit in units}
        self._leaves = {
            unit: partial(self._leave, unit, partial(self._before_backward, unit)) for unit in units
        }
        self._arrived = self._on_input_gradient
        self._is_scaled = False
        self._handles: list[RemovableHandle] = []
        for unit in units:
            self._register(unit)
        if self._sharded:
            self._watch_modules()
        if refreshes.are_ahead:
            self._watch_uses()

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
        if self.model in unit.modules:
            before, after = self._before_model, self._after_model
        elif not self._sharded:
            return
        for module in unit.modules:
            self._handles += [
                module.register_forward_pre_hook(
                    partial(before, unit), prepend=True, with_kwargs=True
                ),
                module.register_forward_hook(partial(after, unit), always_call=True),
            ]

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

    def _watch_uses(self) -> None:
        """Let every module that reads parameters wait until they are refreshed."""
        unit_of = {module: unit for unit in self.units for module in unit.modules}
        for module in self.model.modules():
            used = [self._owner[id(p)] for p in module._parameters.values() if p is not None]
            if module in unit_of:
                used.append(unit_of[module])
            if used:
                self._handles.append(
                    module.register_forward_pre_hook(
                        partial(self._before_read, tuple(dict.fromkeys(used))), prepend=True
                    )
                )

    def _before_read(self, units: Sequence[Unit], module: nn.Module, args: tuple[Any, ...]) -> None:
        for unit in units:
            self.refreshes.use(unit)

    def _watch_modules(self) -> None:
        """Notice modules that are called while their parameters are not here."""
        for name, module in self.model.named_modules():
            own = module._parameters.values()
            owners = {self._owner[id(parameter)] for parameter in own if parameter is not None}
            owners = {unit for unit in owners if module not in unit.modules}
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
                around = (member for member, _ in unit.members if name.startswith(f"{member}."))
                raise ZerompiError(
                    f"{name} was called outside the forward of {next(around, unit.name)}, which gathers its "
                    "parameters: call that module, make a unit of this one (units=), or use "
                    "zero.gathered()"
                )

    def remove(self) -> None:
        """Take all hooks away."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    # -- forward -------------------------------------------------------------------------------

    def _before_forward(
        self, unit: Unit, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        saves = self._sharded and torch.is_grad_enabled()
        forwards, recomputes = self._forwards[unit], in_backward()
        forwards.running.append(False)
        if not recomputes:
            forwards.begin(module)
        unit.holds += 1
        self._unshard(unit)
        if not saves:
            return None
        self._saved[unit].push()
        forwards.running[-1] = True
        # The graph that counts has hooks.
        is_recomputed = recomputes and forwards.is_open(module)
        awaited = _Awaited(self._arrived, unit, module, is_recomputed=is_recomputed)
        args, kwargs = map_arguments(awaited.mark, args, kwargs)
        if awaited.missing and not is_recomputed:
            forwards.opened(module)
        return args, kwargs

    def _unshard(self, unit: Unit) -> None:
        """Make the full parameters of `unit` visible; units that wait for too long make room."""
        self._idle.pop(unit, None)
        if unit.state is UnitState.SHARDED:
            self._forwards[unit].unsharded()
            self.let_go(but=_MAX_IDLE - 1)
        self.gathers.unshard(unit)

    def let_go(self, *, but: int = 0) -> None:
        """Free the full parameters of units that wait for the next of their modules, save the latest."""
        while len(self._idle) > but:
            unit = next(iter(self._idle))
            del self._idle[unit]
            if in_backward():
                unit.reshard()
            else:
                self.gathers.reshard(unit, expect_next=True)

    def _on_input_gradient(self, awaited: _Awaited) -> None:
        """A gradient of a forward's input has come: when all have, its backward is over."""
        unit, module = awaited.unit, awaited.module
        forwards = self._forwards[unit]
        if forwards.returns(module):
            self._idle.pop(unit, None)
            unit.reshard()
        else:
            self._idle[unit] = None
        if awaited.missing == 0 and not awaited.is_recomputed:
            forwards.closed(module)
            self._after_backward(unit)

    def _after_forward(
        self, unit: Unit, module: nn.Module, args: tuple[Any, ...], output: Any
    ) -> Any:
        forwards = self._forwards[unit]
        if not forwards.running:
            return output  # called although a hook before ours has refused the forward
        if forwards.running.pop():
            self._saved[unit].pop()
        unit.holds -= 1
        if self._sharded:
            output = map_tensors(self._leaves[unit], output)
        if not in_backward():
            if forwards.end(module) or output is None:
                self.gathers.reshard(unit, expect_next=output is not None)
            elif not unit.is_resident:
                self._idle[unit] = None
        return output

    def _leave(self, unit: Unit, on_gradient: Callable[[Tensor], None], tensor: Tensor) -> Tensor:
        """What a unit returns: in memory of its own, as its parameters are about to be freed."""
        for segment in unit.segments:
            if segment.covers(tensor):
                tensor = tensor.clone()
                break
        if tensor.requires_grad and torch.is_grad_enabled():
            _hook(tensor, on_gradient)
        return tensor

    def _before_model(
        self, unit: Unit, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if not in_backward():
            progress.phase = "forward"
            self.let_go()
            if self.refreshes.are_pending:
                if self.model.training and self.buffers.changed():
                    self.context.settle()  # these are sent at once
            elif any(unit.is_hidden for unit in self.units):
                self.gathers.begin(with_grad=torch.is_grad_enabled())
            else:  # inside gathered(), where a rank may do what it likes
                self.context.settle()
        if torch.is_grad_enabled() and not in_backward():
            self._check_phase()
            for forwards in self._forwards.values():
                forwards.begin_pass()
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
        if not in_backward():
            self.let_go()
        output = self._after_forward(unit, module, args, output)
        dtype = self.context.precision.output_dtype

        def finish(tensor: Tensor) -> Tensor:
            if dtype is not None and tensor.is_floating_point():
                tensor = tensor.to(dtype)
            if tensor.requires_grad:
                _hook(tensor, self._scale_gradient)
            return tensor

        return map_tensors(finish, output)

    def _check_phase(self) -> None:
        """Refuse what would be silently wrong; forget a backward pass that an exception ended."""
        if self._end_is_queued:
            self._end_is_queued = False
            self.discard_gradients()
        own = (p for m in self.model.modules() for p in m._parameters.values() if p is not None)
        strange = next((p for p in own if id(p) not in self._owner), None)
        if strange is not None:
            names = (name for name, p in self.model.named_parameters() if p is strange)
            raise ZerompiError(
                f"{next(names)} was not in the model when it was partitioned: change the model before "
                "zerompi.partition"
            )
        for unit in self.units:
            for segment in unit.segments:
                if not segment.trainable and any(p.requires_grad for p in segment.parameters):
                    raise ZerompiError(
                        f"parameters of {unit.name} were frozen when the model was partitioned and "
                        "require a gradient now: set requires_grad before zerompi.partition"
                    )
            unit.check_untouched()

    def discard_gradients(self) -> None:
        """Forget all gradients that are not reduced yet."""
        self._is_scaled = False
        self.reductions.reset()
        for unit in self.units:
            self._forwards[unit].reset()
            unit.discard_gradients()
        self.accumulation.forget()

    # -- backward ------------------------------------------------------------------------------

    def _scale_gradient(self, gradient: Tensor) -> Tensor | None:
        self._queue_end()
        self._is_scaled = True
        return None if self.scaler is None else gradient * self.scaler.scale

    def _before_backward(self, unit: Unit, gradient: Tensor | None = None) -> None:
        """The backward of a module begins, or goes on."""
        self._queue_end()
        self._unshard(unit)
        self._keep(unit)

    def _keep(self, unit: Unit) -> None:
        """With create_graph=True the graph of this backward pass will read the parameters again."""
        if torch.is_grad_enabled() and unit not in self._kept:
            unit.holds += 1
            self._kept.append(unit)

    def _before_use(self, unit: Unit) -> None:
        """A saved parameter is needed: in a backward pass, or because somebody looks at the graph."""
        is_begun = self._end_is_queued and not torch.is_grad_enabled()
        if is_begun and unit.is_visible and unit not in self._idle:
            return
        if in_backward():
            self._before_backward(unit)
        else:
            self._unshard(unit)

    def _after_backward(self, unit: Unit) -> None:
        """A backward of a module is over; if it was the unit's last, it expects no gradient any more.

        Not even of parameters that this rank has not used, as another one may have. Where units are
        gathered, the others reduce this one before they gather the next.
        """
        is_over = self._forwards[unit].is_over
        if is_over and unit.trainable and self.accumulation.communicates:
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
        is_complete = unit.is_complete and self._forwards[unit].may_be_complete
        if self.accumulation.communicates and is_complete:
            self.reductions.ready(unit, self.gradient_scale)

    def _queue_end(self) -> None:
        if not self._end_is_queued:
            self.refreshes.finish()  # of units that this forward has not used; the graph may be older
            self._end_is_queued = True
            self.let_go()
            progress.phase = "backward"
            torch.autograd.Variable._execution_engine.queue_callback(self._end_of_backward)

    def _end_of_backward(self) -> None:
        self._end_is_queued = False
        if torch.is_grad_enabled() and self._kept:
            return  # a pass with create_graph=True only prepared another one
        self.release_kept()
        self._idle.clear()
        collected = any(gradients.collected for unit in self.units for gradients in unit.gradients)
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
            self._forwards[unit].reset()
            for gradients in unit.gradients:
                gradients.collected = 0
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
        nbytes = sum(gradients.nbytes for unit in self.units for gradients in unit.gradients)
        self.context.memory.set("gradients", nbytes)
