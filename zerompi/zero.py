"""`Zero`: what `zerompi.partition` returns."""

from __future__ import annotations

import atexit
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from zerompi import launch, registry
from zerompi import state as states
from zerompi.accounting import measure_parameters, memory_report
from zerompi.agreement import agreement
from zerompi.checkpoint import CheckpointReader, write_checkpoint
from zerompi.errors import MismatchError, ZerompiError
from zerompi.hooks import Hooks
from zerompi.optimizer import PieceOptimizer
from zerompi.placement import Placement
from zerompi.report import Report
from zerompi.segment import Context
from zerompi.unit import Unit


class Zero:
    """A partitioned model and its optimizer; made by `zerompi.partition`, not directly.

    The model, the optimizer, LR schedulers and `loss.backward()` are used as without zerompi. What
    is different: the optimizer holds this rank's pieces of the parameters, and at stage 3 a
    parameter has values only inside the forward and backward of its unit and inside `gathered`.
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
        self._aliases = states.aliases(model, units)
        self._state_keys = list(model.state_dict(keep_vars=True))
        self._uninitialised = without_values
        self._optimizer = PieceOptimizer(optimizer, units, context, scaler)
        self._hooks = Hooks(model, units, context, scaler)
        self._hooks.buffers.synchronise()
        self._guards = [
            model.register_forward_pre_hook(self._refuse_uninitialised, prepend=True),
            model.register_load_state_dict_pre_hook(self._refuse_load_state_dict),
            *(m.register_state_dict_pre_hook(self._refuse_state_dict) for m in model.modules()),
        ]
        self._zero_grad = model.zero_grad
        model.zero_grad = self._zero_grad_of_pieces  # type: ignore[method-assign]
        registry.register((entry.name, entry.parameter) for entry in states.entries(units))
        if optimizer is not None:
            self._guards.append(optimizer.register_step_post_hook(self._end_of_step))
        self._closed = False
        self._traffic_mark = context.world.traffic.snapshot()
        self._step_traffic: Mapping[str, Mapping[str, int]] = {}
        self._step_times: Mapping[str, float] = {}
        measure_parameters(self._units, context)
        self._optimizer.measure_states()
        atexit.register(self._at_exit)

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

    @property
    def num_copies(self) -> int:
        """How many copies of the full parameters the ranks make that hold them in shards together.

        One for each node where its ranks share memory, one for each rank elsewhere.
        """
        group = self._context.shard_group
        return group.topology.num_nodes if self._context.is_shared else group.size

    # -- training ------------------------------------------------------------------------------

    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> Tensor:
        """Scale all gradients so that their total norm is at most `max_norm`.

        Collective: every rank calls this, between `backward` and `optimizer.step()`.

        Returns:
            The total norm of the mean gradient before clipping: 0-dim, float32 (float64 if the main
            weights are), identical on all ranks; inf or NaN if a gradient is.

        Raises:
            ValueError: `norm_type` is not positive.
            MismatchError: a rank does something else.
        """
        self._check_open()
        return self._optimizer.clip_grad_norm_(max_norm, norm_type)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Accumulate gradients without communication: backward passes inside reduce nothing.

        The next backward pass outside reduces the sum of all. Unreduced gradients take the memory
        of the whole model's, in the reduce dtype, at every stage; an exception in a backward pass
        drops them.
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
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"count: expected a positive integer, got {count!r}")
        accumulation = self._hooks.accumulation
        if accumulation.expected is not None:
            raise ZerompiError("accumulate: expected no enclosing accumulate, got one")
        accumulation.expected, accumulation.seen = count, 0
        try:
            yield
            if accumulation.seen != count:
                raise ZerompiError(
                    f"accumulate: expected {count} backward passes, got {accumulation.seen}"
                )
        except BaseException:
            self._hooks.discard_gradients()
            raise
        finally:
            accumulation.expected, accumulation.seen = None, 0

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
        forwards inside gather nothing. With `writable` they are the main weights; when the context
        ends without an exception, rank 0's values are taken over on all ranks; forwards inside are
        refused.

        Raises:
            ValueError: `module` is not part of the model.
        """
        self._check_open()
        units = self._units_of(self._model if module is None else module)
        names = ", ".join(unit.name for unit in units)
        self._agree(f"gathered(writable={writable}) of {names}")
        with ExitStack() as stack:
            for unit in units:
                if writable:
                    stack.enter_context(unit.main_weights())
                else:
                    stack.enter_context(_held(unit))
            if not writable and torch.is_grad_enabled():
                stack.enter_context(self._hooks.saved_parameters(units))
            yield
        if writable:
            self._uninitialised -= {entry.name for entry in states.entries(units)}

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
        parameters are one tensor under all their names. Buffers are rank 0's. Extra state of
        modules (`get_extra_state`) is not included. With `rank0_only`, the other ranks get an empty
        dict and no memory is taken there beyond one unit.
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
                        values[name] = segment.view(flat, index).to("cpu", copy=True)
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
        given: dict[str, Tensor] = {}
        with agreement(self._context.world.comm):
            if self.rank == 0:
                given = {key: torch.as_tensor(value) for key, value in (sd or {}).items()}
                shapes = {key: value.shape for key, value in given.items()}
                states.check_names("sd", shapes, self._model, self._units, self._aliases)
                given = {self._aliases.get(key, key): value for key, value in given.items()}
        for unit in self._units:
            for segment in unit.segments:
                flat = segment.zeros_like_full()
                if self.rank == 0:
                    for index, name in enumerate(segment.names):
                        segment.view(flat, index).copy_(given[name])
                segment.set_values(flat)
        if self.rank == 0:
            for name, buffer in states.persistent_buffers(self._model).items():
                buffer.detach().copy_(given[name])
        self._hooks.buffers.synchronise(everything=True)
        self._uninitialised.difference_update(self._state_keys)

    # -- checkpoints ---------------------------------------------------------------------------

    def save(self, path: str | PathLike[str], *, extra: Mapping[str, Any] | None = None) -> None:
        """Write a checkpoint directory that is complete or absent. Collective.

        `model.safetensors` has the main weights and buffers under their Hugging Face names,
        `optimizer.safetensors` the optimizer's state as `<state>.<parameter name>`, `state.json`
        the rest: the optimizer's settings, the generators of all ranks, the loss scale, and
        `extra`, which must be JSON (rank 0's is kept). Every rank writes its own byte ranges; none
        holds the whole model.

        Raises:
            CheckpointError: it could not be written (on all ranks; what was at `path` is untouched).
        """
        self._agree(f"save of {path}")
        comm, optimizer = self._context.world.comm, self._optimizer.optimizer
        self._hooks.buffers.synchronise()
        rng = comm.gather(states.rng_state(), root=0)
        with agreement(comm):
            model = states.model_table(self._model, self._units)
            optimizer_state = states.optimizer_table(optimizer, self._units)
            rest = {
                "extra": dict(extra or {}),
                "optimizer": states.plain_optimizer_state(optimizer, self._units),
                "loss_scaler": None if self._scaler is None else self._scaler.state_dict(),
                "rng": rng,
            }
        write_checkpoint(Path(path), model, optimizer_state, rest, comm)

    def load(
        self, path: str | PathLike[str], *, names: Callable[[str], str | None] | None = None
    ) -> dict[str, Any]:
        """Load a checkpoint, or the weights of a Hugging Face directory; return `extra`. Collective.

        Each rank reads its slices only. Any number of ranks and any stage may have written it. The
        random generators are restored if the number of ranks is the same. `names` maps the stored
        name of a weight or buffer to the model's; None leaves it out.

        Raises:
            ZerompiError: it is not of this model (on all ranks, before anything is overwritten).
            CheckpointError: it cannot be read or is damaged (on all ranks; of damage inside a tensor, which
                is found as it is read, after some tensors may have been overwritten: load another one).
        """
        self._agree("load")
        comm, optimizer = self._context.world.comm, self._optimizer.optimizer
        with ExitStack() as stack:
            with agreement(comm):
                reader = stack.enter_context(CheckpointReader(Path(path), names=names))
                states.check_model(reader, self._model, self._units, self._aliases)
                if optimizer is not None and reader.state:
                    states.check_optimizer_state(reader, optimizer, self._units)
            with agreement(comm):
                states.read_model(reader, self._model, self._units, self._aliases)
                if optimizer is not None and reader.state:
                    states.read_optimizer(reader, optimizer, self._units)
            saved = dict(reader.state)
        self._hooks.release_kept()
        self._optimizer.refresh(everything=True)
        rng = saved.get("rng") or []
        with agreement(comm):
            if self._scaler is not None and saved.get("loss_scaler"):
                self._scaler.load_state_dict(saved["loss_scaler"])
            if len(rng) == self.size:
                states.set_rng_state(rng[self.rank])
        self._uninitialised.difference_update(self._state_keys)
        return dict(saved.get("extra") or {})

    # -- report --------------------------------------------------------------------------------

    def report(self) -> Report:
        """Traffic and time of the last step (up to the last `optimizer.step()`), memory now and at peak."""
        self._hooks.measure_gradients()
        self._optimizer.measure_states()
        return Report(
            traffic=self._step_traffic,
            memory=memory_report(self._units, self._optimizer.optimizer, self._context),
            time=self._step_times,
        )

    def _end_of_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._hooks.release_kept()
        self._hooks.gathers.end_of_step()
        traffic = self._context.world.traffic
        self._step_traffic = traffic.difference(self._traffic_mark)
        self._traffic_mark = traffic.snapshot()
        self._step_times = self._context.times.reset()

    # -- guards --------------------------------------------------------------------------------

    def _refuse_uninitialised(self, module: nn.Module, args: Any) -> None:
        if not self._uninitialised:
            return
        for name, buffer in self._model.named_buffers():
            if not torch.isnan(buffer).all():
                self._uninitialised.discard(name)  # filled by hand
        names = sorted(self._uninitialised)
        if names:
            raise ZerompiError(
                f"{len(names)} tensors were on the meta device and have no values yet: "
                f"{', '.join(names[:5])}{' ...' if len(names) > 5 else ''}; call zero.load(...), or "
                "give their modules a reset_parameters method; buffers that no checkpoint holds can be "
                "made on the host"
            )

    def _refuse_state_dict(self, module: nn.Module, prefix: str, keep_vars: bool) -> None:
        if any(unit.is_hidden for unit in self._units_of(module)):
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
        shared = any(s.is_node_copy for unit in self._units for s in unit.segments)
        if separate or shared or self._context.stage.parameter is Placement.SHARD:
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
        self._context.settle()
        self._context.world.agree(operation)

    # -- end -----------------------------------------------------------------------------------

    def close(self) -> None:
        """Remove the hooks and free the communicators. Collective; a second call does nothing.

        Until then the partition, and with it the model, stays alive. The model is left as it is:
        copies of the parameters can be taken before, with `full_state_dict` or inside `gathered`.
        """
        if self._closed:
            return
        self._agree("close of the partition")
        self._closed = True
        self._context.thread.close()
        atexit.unregister(self._at_exit)
        self._hooks.remove()
        self._optimizer.remove()
        for guard in self._guards:
            guard.remove()
        self._model.zero_grad = self._zero_grad  # type: ignore[method-assign]
        registry.forget(entry.parameter for entry in states.entries(self._units))
        self._leave_shared_memory()
        context = self._context
        groups = (context.node_group, context.replica_group, context.shard_group, context.world)
        for group in groups:
            if group is not None:
                group.close()

    def _leave_shared_memory(self) -> None:
        """Take the model and the optimizer out of the windows, then free these. Collective."""
        for unit in self._units:
            for segment in unit.segments:
                segment.leave_shared_memory()
            unit.slot = unit.gather = None
        self._context.slots.clear()
        for window in self._context.windows:
            window.close()

    def _at_exit(self) -> None:
        """Tell ranks that still train that this one has ended, so that they do not wait for it."""
        if not self._closed and not launch.is_alone():
            try:
                self._agree("end of the program")
            except MismatchError as error:  # nobody else would see it: atexit swallows exceptions
                launch.report_and_abort(type(error), error, error.__traceback__)

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
