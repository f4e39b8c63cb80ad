"""`Zero`: what `zerompi.partition` returns."""

from __future__ import annotations

import atexit
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from zerompi import state as states
from zerompi.checkpoint import CheckpointReader, agree_error, agreement, write_checkpoint
from zerompi.errors import ZerompiError
from zerompi.hooks import Hooks
from zerompi.optimizer import PieceOptimizer
from zerompi.placement import Placement
from zerompi.report import ElementBytes, MemoryReport, Report, storage_nbytes, zero_formula
from zerompi.segment import Context
from zerompi.unit import Unit, UnitState


class Zero:
    """A partitioned model and its optimizer; made by `zerompi.partition`, not directly.

    The model, the optimizer, LR schedulers and `loss.backward()` are used as without zerompi. What is
    different: the optimizer holds this rank's pieces of the parameters, and at stage 3 a parameter
    has values only inside the forward and backward of its unit and inside `gathered`.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None,
        units: Sequence[Unit],
        context: Context,
        without_values: set[str],
    ) -> None:
        self._model = model
        self._units = list(units)
        self._context = context
        self._scaler = scaler = context.precision.make_scaler()
        self._aliases = _aliases(model, units)
        self._state_keys = list(model.state_dict(keep_vars=True))
        self._uninitialised = without_values
        self._optimizer = PieceOptimizer(optimizer, units, context, scaler)
        self._hooks = Hooks(model, units, context, scaler)
        self._hooks.buffers.synchronise()
        self._guards = [
            model.register_forward_pre_hook(self._refuse_uninitialised, prepend=True),
            model.register_state_dict_pre_hook(self._refuse_state_dict),
            model.register_load_state_dict_pre_hook(self._refuse_load_state_dict),
        ]
        self._zero_grad = model.zero_grad
        model.zero_grad = self._zero_grad_of_pieces  # type: ignore[method-assign]
        if optimizer is not None:
            self._guards.append(optimizer.register_step_post_hook(self._end_of_step))
        self._closed = False
        self._traffic_mark = context.world.traffic.snapshot()
        self._step_traffic: Mapping[str, Mapping[str, int]] = {}
        self._step_times: Mapping[str, float] = {}
        self._measure()
        self._exit = weakref.WeakMethod(self._at_exit)
        atexit.register(_call_if_alive, self._exit)

    # -- properties ----------------------------------------------------------------------------

    @property
    def rank(self) -> int:
        """This process's rank in the partition's communicator."""
        return self._context.world.rank

    @property
    def size(self) -> int:
        """Number of ranks of the partition's communicator."""
        return self._context.world.size

    @property
    def loss_scale(self) -> float:
        """The factor by which gradients are scaled inside the model now; 1 without loss scaling."""
        return 1.0 if self._scaler is None else self._scaler.scale

    @property
    def unit_names(self) -> list[str]:
        """Names of the modules whose parameters are gathered together."""
        return [unit.name for unit in self._units]

    # -- training ------------------------------------------------------------------------------

    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> Tensor:
        """Scale all gradients so that their total norm is at most `max_norm`.

        Collective: every rank calls this, between `backward` and `optimizer.step()`.

        Returns:
            The total norm of the mean gradient before clipping: float32, 0-dim, identical on all ranks;
            inf or NaN if a gradient is.
        """
        self._check_open()
        return self._optimizer.clip_grad_norm_(max_norm, norm_type)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Accumulate gradients without communication: backward passes inside reduce nothing.

        The next backward pass outside reduces the sum of all. Unreduced gradients take the memory of
        the whole model's, in the reduce dtype, at every stage.
        """
        self._check_open()
        self._hooks.accumulation.paused += 1
        try:
            yield
        finally:
            self._hooks.accumulation.paused -= 1

    @contextmanager
    def accumulate(self, count: int) -> Iterator[None]:
        """Take the mean over all ranks' `count` backward passes inside, communicating at the last only.

        The loss is not divided by `count`: zerompi divides once, in the reduction.

        Raises:
            ValueError: `count` is not a positive integer.
            ZerompiError: the context ends after another number of backward passes.
        """
        self._check_open()
        if not isinstance(count, int) or count < 1:
            raise ValueError(f"count: expected a positive integer, got {count!r}")
        accumulation = self._hooks.accumulation
        if accumulation.count != 1:
            raise ZerompiError("accumulate: expected no enclosing accumulate, got one")
        accumulation.count, accumulation.seen = count, 0
        try:
            yield
            if count > 1 and accumulation.seen != count:
                raise ZerompiError(
                    f"accumulate: expected {count} backward passes, got {accumulation.seen}"
                )
        finally:
            accumulation.count, accumulation.seen = 1, 0

    def _zero_grad_of_pieces(self, set_to_none: bool = True) -> None:
        """`model.zero_grad`: the gradients of a partitioned model hang on its pieces."""
        self._zero_grad(set_to_none)
        for entry in states.entries(self._units):
            if set_to_none or entry.piece.grad is None:
                entry.piece.grad = None
            else:
                entry.piece.grad.zero_()

    # -- full values ---------------------------------------------------------------------------

    @contextmanager
    def gathered(self, module: nn.Module | None = None, writable: bool = False) -> Iterator[None]:
        """Full parameters of `module` (None: the model) are visible as ordinary tensors inside.

        Collective: every rank enters and leaves. Read-only, the parameters have the parameter dtype, and
        forwards inside gather nothing. With `writable` they are the main weights; when the context ends
        without an exception, rank 0's values are taken over on all ranks; forwards inside are refused.

        Raises:
            ValueError: `module` is not part of the model.
        """
        self._check_open()
        units = self._units_of(module or self._model)
        names = ", ".join(unit.name for unit in units)
        self._agree(f"gathered(writable={writable}) of {names}")
        with ExitStack() as stack:
            for unit in units:
                if writable:
                    stack.enter_context(unit.main_weights(write=True))
                else:
                    stack.enter_context(_held(unit))
            yield
        if writable:
            self._uninitialised.clear()

    def _units_of(self, module: nn.Module) -> list[Unit]:
        if not any(module is known for known in self._model.modules()):
            raise ValueError(f"module: expected a module of the model, got {type(module).__name__}")
        wanted = {id(parameter) for parameter in module.parameters()}
        return [
            unit
            for unit in self._units
            if any(wanted.intersection(segment.index_of) for segment in unit.segments)
        ]

    def full_state_dict(self, rank0_only: bool = False) -> dict[str, Tensor]:
        """Parameters (main weights: float32 under mixed precision) and buffers, on the host.

        Collective. Names and order are those of `model.state_dict()` before the partition; tied
        parameters are one tensor under all their names. Buffers are rank 0's. With `rank0_only`, the other
        ranks get an empty dict and no memory is taken there beyond one unit.
        """
        self._agree(f"full_state_dict(rank0_only={rank0_only})")
        self._hooks.buffers.synchronise()
        keep = not rank0_only or self.rank == 0
        values: dict[str, Tensor] = {}
        for unit in self._units:
            for segment in unit.segments:
                flat = segment.main_values()
                if keep:
                    for index, name in enumerate(segment.names):
                        values[name] = segment.view(flat, index).clone()
        if not keep:
            return {}
        for name, buffer in states.persistent_buffers(self._model).items():
            values[name] = buffer.detach().cpu().clone()
        return {
            key: values[self._aliases.get(key, key)]
            for key in self._state_keys
            if self._aliases.get(key, key) in values
        }

    def load_full_state_dict(self, sd: Mapping[str, Tensor] | None) -> None:
        """Take the parameters and buffers of rank 0's `sd`; the reverse of `full_state_dict`.

        Collective; what other ranks pass is ignored (None or an empty dict will do).

        Raises:
            ZerompiError: names or shapes are not the model's (on all ranks, nothing is changed).
        """
        self._agree("load_full_state_dict")
        error = None
        if self.rank == 0:
            error = _state_dict_error(sd or {}, self._model, self._units, self._aliases)
        agree_error(self._context.world.comm, error)
        given = {self._aliases.get(key, key): value for key, value in (sd or {}).items()}
        for unit in self._units:
            for segment in unit.segments:
                flat = torch.zeros(segment.layout.padded_numel, dtype=segment.main_dtype)
                if self.rank == 0:
                    for index, name in enumerate(segment.names):
                        segment.view(flat, index).copy_(given[name])
                segment.set_values(flat)
        if self.rank == 0:
            for name, buffer in states.persistent_buffers(self._model).items():
                buffer.detach().copy_(given[name])
        self._hooks.buffers.synchronise(everything=True)
        self._uninitialised.clear()

    # -- checkpoints ---------------------------------------------------------------------------

    def save(self, path: str | PathLike[str], *, extra: Mapping[str, Any] | None = None) -> None:
        """Write a checkpoint directory that is complete or absent. Collective.

        `model.safetensors` has the main weights and buffers under their Hugging Face names,
        `optimizer.safetensors` the optimizer's state as `<state>.<parameter name>`, `state.json` the rest: the
        optimizer's settings, the generators of all ranks, the loss scale, and `extra`, which must
        be JSON (rank 0's is kept). Every rank writes its own byte ranges; none holds the whole model.

        Raises:
            CheckpointError: it could not be written (on all ranks; what was at `path` is untouched).
        """
        self._agree(f"save of {path}")
        comm, optimizer = self._context.world.comm, self._optimizer.optimizer
        self._hooks.buffers.synchronise()
        rng = comm.gather(states.rng_state(), root=0)
        write_checkpoint(
            Path(path),
            states.model_table(self._model, self._units),
            states.optimizer_table(optimizer, self._units),
            {
                "extra": dict(extra or {}),
                "optimizer": states.plain_optimizer_state(optimizer, self._units),
                "loss_scaler": None if self._scaler is None else self._scaler.state_dict(),
                "rng": rng,
            },
            comm,
        )

    def load(self, path: str | PathLike[str]) -> dict[str, Any]:
        """Load a checkpoint, or the weights of a Hugging Face directory; return `extra`. Collective.

        Each rank reads its slices only. Any number of ranks and any stage may have written it. The
        random generators are restored if the number of ranks is the same.

        Raises:
            CheckpointError, ZerompiError: it is damaged or not of this model (on all ranks, before
                anything is overwritten).
        """
        self._agree("load")
        comm, optimizer = self._context.world.comm, self._optimizer.optimizer
        with ExitStack() as stack:
            with agreement(comm):
                reader = stack.enter_context(CheckpointReader(Path(path)))
                states.check_model(reader, self._model, self._units, self._aliases)
                if optimizer is not None and reader.state:
                    states.check_optimizer_state(reader, optimizer, self._units)
            with agreement(comm):
                states.read_model(reader, self._model, self._units, self._aliases)
                if optimizer is not None and reader.state:
                    states.read_optimizer(reader, optimizer, self._units)
            saved = dict(reader.state)
        for unit in self._units:
            for segment in unit.segments:
                segment.refresh()
        if self._scaler is not None and saved.get("loss_scaler"):
            self._scaler.load_state_dict(saved["loss_scaler"])
        rng = saved.get("rng") or []
        if len(rng) == self.size:
            states.set_rng_state(rng[self.rank])
        self._uninitialised.clear()
        return dict(saved.get("extra") or {})

    # -- report --------------------------------------------------------------------------------

    def report(self) -> Report:
        """Traffic and time of the last step (up to the last `optimizer.step()`), memory now and at peak."""
        self._measure()
        memory = self._context.memory
        return Report(
            traffic=self._step_traffic,
            memory=MemoryReport(dict(memory.now), dict(memory.peak), self._formula()),
            time=self._step_times,
        )

    def _formula(self) -> dict[str, float]:
        total = dict.fromkeys(("parameters", "gradients", "optimizer_states"), 0.0)
        tensors_per_element = self._state_tensors_per_element()
        for unit in self._units:
            for segment in unit.segments:
                separate = segment.main_dtype is not segment.dtype
                state_bytes = segment.main_dtype.itemsize * (tensors_per_element + separate)
                per_element = ElementBytes(
                    parameter=segment.dtype.itemsize,
                    gradient=segment.reduce_dtype.itemsize if segment.trainable else 0,
                    optimizer_state=state_bytes if segment.trainable else 0,
                )
                part = zero_formula(
                    segment.layout.numel,
                    self._context.shard_group.size,
                    self._context.stage,
                    per_element,
                )
                for category, nbytes in part.items():
                    total[category] += nbytes
        return total

    def _state_tensors_per_element(self) -> int:
        """How many elementwise states the optimizer keeps (2 for Adam); 0 before its first step."""
        optimizer = self._optimizer.optimizer
        if optimizer is None or not optimizer.state:
            return 0
        piece, state = max(optimizer.state.items(), key=lambda item: item[0].numel())
        return sum(
            isinstance(value, Tensor) and value.shape == piece.shape for value in state.values()
        )

    def _measure(self) -> None:
        segments = [segment for unit in self._units for segment in unit.segments]
        memory = self._context.memory
        if self._context.stage.parameter is Placement.SHARD:
            memory.set("parameters", storage_nbytes(segment.shard for segment in segments))
        else:
            memory.set("parameters", storage_nbytes(segment.full.tensor for segment in segments))
        self._hooks.measure_gradients()
        self._optimizer.measure_states()

    def _end_of_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._hooks.release_kept()
        traffic = self._context.world.traffic
        self._step_traffic = traffic.difference(self._traffic_mark)
        self._traffic_mark = traffic.snapshot()
        self._step_times = self._context.times.reset()

    # -- guards --------------------------------------------------------------------------------

    def _refuse_uninitialised(self, module: nn.Module, args: Any) -> None:
        if self._uninitialised:
            names = sorted(self._uninitialised)
            raise ZerompiError(
                f"{len(names)} tensors were on the meta device and have no values yet: "
                f"{', '.join(names[:5])}{' ...' if len(names) > 5 else ''}; call zero.load(...), or "
                "give their modules a reset_parameters method"
            )

    def _refuse_state_dict(self, module: nn.Module, prefix: str, keep_vars: bool) -> None:
        if any(unit.state is UnitState.SHARDED for unit in self._units if unit.segments):
            raise ZerompiError(
                "model.state_dict() of a partitioned model: the parameters are not here; use "
                "zero.full_state_dict(), or call it inside zero.gathered()"
            )

    def _refuse_load_state_dict(self, *args: Any) -> None:
        separate = any(
            segment.main_dtype is not segment.dtype
            for unit in self._units
            for segment in unit.segments
        )
        if separate or self._context.stage.parameter is Placement.SHARD:
            raise ZerompiError(
                "model.load_state_dict() would not reach the main weights of a partitioned model; use "
                "zero.load_full_state_dict()"
            )

    def _check_open(self) -> None:
        if self._closed:
            raise ZerompiError("this partition is closed")

    def _agree(self, operation: str) -> None:
        """Make sure that all ranks are about to do the same."""
        self._check_open()
        self._context.world.agree(operation)

    # -- end -----------------------------------------------------------------------------------

    def close(self) -> None:
        """Remove the hooks and free the communicators. Collective; a second call does nothing.

        The model is left as it is: inside `with zero.gathered(writable=True)` copies can be taken before.
        """
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self._exit)
        self._hooks.remove()
        self._optimizer.remove()
        for guard in self._guards:
            guard.remove()
        del self._model.zero_grad
        for group in (self._context.replica_group, self._context.shard_group, self._context.world):
            if group is not None:
                group.close()

    def _at_exit(self) -> None:
        """Tell ranks that still train that this one has ended, so that they do not wait for it."""
        if not self._closed:
            self._context.world.agree("end of the program")

    def __enter__(self) -> Zero:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()


@contextmanager
def _held(unit: Unit) -> Iterator[None]:
    unit.holds += 1
    try:
        unit.unshard()
        yield
    finally:
        unit.holds -= 1
        unit.reshard()


def _call_if_alive(method: weakref.WeakMethod[Any]) -> None:
    function = method()
    if function is not None:
        function()


def _aliases(model: nn.Module, units: Sequence[Unit]) -> dict[str, str]:
    """Other names of tied parameters -> the name under which they are kept."""
    kept = {
        id(parameter): name
        for unit in units
        for segment in unit.segments
        for name, parameter in zip(segment.names, segment.parameters, strict=True)
    }
    return {
        name: kept[id(parameter)]
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if name != kept[id(parameter)]
    }


def _state_dict_error(
    given: Mapping[str, Tensor],
    model: nn.Module,
    units: Sequence[Unit],
    aliases: Mapping[str, str],
) -> ZerompiError | None:
    names = {aliases.get(name, name) for name in given}
    expected = {entry.name: entry.shape for entry in states.entries(units)}
    expected.update({n: tuple(b.shape) for n, b in states.persistent_buffers(model).items()})
    problems = [f"missing {name}" for name in expected if name not in names]
    problems += [f"unexpected {name}" for name in sorted(names) if name not in expected]
    problems += [
        f"{name}: expected shape {expected[aliases.get(name, name)]}, got {tuple(value.shape)}"
        for name, value in given.items()
        if aliases.get(name, name) in expected
        and tuple(value.shape) != tuple(expected[aliases.get(name, name)])
    ]
    if not problems:
        return None
    return ZerompiError("sd is not a state dict of this model: " + "; ".join(problems[:20]))
