"""`Zero`: what `zerompi.partition` returns."""

from __future__ import annotations

import atexit
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from os import PathLike
from types import TracebackType
from typing import Any, Literal

from torch import Tensor, nn
from torch.optim import Optimizer

from zerompi import launch, registry
from zerompi import state as states
from zerompi.accounting import MessageBytes, measure_parameters, memory_report, message_nbytes
from zerompi.activity import phase, progress
from zerompi.checkpoint import WriteOptions
from zerompi.checkpoints import Checkpoints, SaveOptions
from zerompi.context import Context
from zerompi.errors import ZerompiError
from zerompi.full_values import FullValues
from zerompi.guards import Guards
from zerompi.join import Follower, Stateful
from zerompi.parts import Parts
from zerompi.report import Report
from zerompi.unit import Unit
from zerompi.zero_grad import ZeroGrad

_DEFAULTS = WriteOptions()


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
        self._parts = parts = Parts(
            model, optimizer, units, context, without_values, self._end_of_step
        )
        self._units, self._context = parts.units, context
        self._optimizer, self._hooks = parts.piece_optimizer, parts.hooks
        self._guards = Guards(parts)
        self._full_values = FullValues(parts)
        self._checkpoints = Checkpoints(parts)
        self._zero_grad = ZeroGrad(parts)
        methods: dict[str, Callable[..., Any]] = {
            "full_state_dict": self._full_values.state_dict,
            "save": self._checkpoints.save,
            "zero_grad": self._zero_grad.follow,
        }
        self._follower = Follower(units, context, self._hooks, self._optimizer, methods)
        registry.register((entry.name, entry.parameter) for entry in states.entries(units))
        self._num_steps = 0
        self._traffic_mark = context.world.traffic.snapshot()
        self._step_traffic: Mapping[str, Mapping[str, int]] = {}
        self._step_times: Mapping[str, float] = {}
        self._step_spared = 0
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
        scaler = self._parts.scaler
        return 1.0 if scaler is None else scaler.scale

    @property
    def skipped_steps(self) -> int:
        """How many optimizer steps were skipped because a gradient was not finite."""
        return self._optimizer.skipped_steps

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

    @property
    def skipped(self) -> list[str]:
        """What the last `load(strict=False)` has not loaded and why, one sentence each."""
        return list(self._checkpoints.skipped)

    @property
    def message_nbytes(self) -> MessageBytes:
        """Bytes of all parameters and of all gradients, as one gather and one reduction send them."""
        return message_nbytes(self._units)

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
        self._parts.check_open()
        return self._optimizer.clip_grad_norm_(max_norm, norm_type)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Accumulate gradients without communication: backward passes inside reduce nothing.

        The next backward pass outside reduces the sum of all. Unreduced gradients take the memory
        of the whole model's, in the reduce dtype, at every stage; an exception in a backward pass
        drops them.
        """
        self._parts.check_open()
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
        self._parts.check_open()
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

    @contextmanager
    def weighted(self, samples: float) -> Iterator[None]:
        """The loss of backward passes inside is a mean over `samples` samples, or tokens, of this rank.

        Gradients are then the mean over all ranks' samples, instead of the mean of the ranks' means:
        the sum of the weighted gradients, divided once by the sum of all weights. Every rank gives a
        weight for each pass that some rank gives one for. With 0 the pass counts for nothing, even if
        its gradient is NaN. It costs one agreement (16 bytes) for each pass that communicates.

        Raises:
            ValueError: `samples` is negative or not finite.
            ZerompiError: the weights of all ranks are 0 (from `backward`).
        """
        self._parts.check_open()
        weight = float(samples)
        if not 0 <= weight < math.inf:
            raise ValueError(f"samples: expected 0 or a positive number, got {samples}")
        accumulation = self._hooks.accumulation
        before, accumulation.weight = accumulation.weight, weight
        try:
            yield
        finally:
            accumulation.weight = before

    @contextmanager
    def join(self, *schedulers: Stateful) -> Iterator[None]:
        """Ranks may run different numbers of batches inside, in training and in evaluation.

        Collective: every rank enters and leaves. Inside, all ranks that still have batches do the same
        in the same order. A rank that reaches the end of the context waits there until all have, and takes
        its part meanwhile in what the others do: it gathers and reduces with nothing of its own, and its
        optimizer steps its pieces with the settings (learning rate ...) of the others. Gradients are the mean
        over the batches of the ranks that still have one; `weighted` makes it the mean over samples.

        At the end all ranks have the same optimizer settings and buffers, and the same state of the
        `schedulers` (anything with `state_dict` and `load_state_dict`): those of the ranks that were
        last. Name every scheduler that is stepped inside.

        Inside, communication of your own (the mean of a loss) waits for ever for a rank that has
        nothing more to do: leave it until after the context. `gathered`, `full_state_dict`, `save` and
        `clip_grad_norm_` work; what changes weights, another partition, and a step with a closure are
        refused. After an exception the ranks have gone different ways: end the job.

        Raises:
            ZerompiError: inside another `join`; or this rank has left gradients of `no_sync` behind.
            MismatchError: ranks that still have batches do different things.
        """
        self._parts.agree("join")
        context = self._context
        with context.attendance.open(context.thread.when_idle), self._zero_grad.announced():
            yield
            self._follower.follow()
            self._follower.catch_up(schedulers)

    # -- full values ---------------------------------------------------------------------------

    def gathered(
        self, module: nn.Module | None = None, writable: bool = False
    ) -> AbstractContextManager[None]:
        """Full parameters of `module` (None: the model) are visible as ordinary tensors inside.

        Collective: every rank enters and leaves. Read-only, the parameters have the parameter dtype, and
        forwards inside gather nothing. With `writable` they are the main weights; when the context
        ends without an exception, rank 0's values are taken over on all ranks; forwards inside are
        refused.

        Raises:
            ValueError: `module` is not part of the model.
        """
        return self._full_values.gathered(module, writable)

    def full_state_dict(self, rank0_only: bool = False) -> dict[str, Tensor]:
        """Parameters (main weights: float32 under mixed precision) and buffers, on the host.

        Collective. Names and order are those of `model.state_dict()` before the partition; tied
        parameters are one tensor under all their names. Buffers are rank 0's. Extra state of
        modules (`get_extra_state`) is not included. With `rank0_only`, the other ranks get an empty
        dict and no memory is taken there beyond one unit.
        """
        return self._full_values.state_dict(rank0_only)

    def load_full_state_dict(self, sd: Mapping[str, Tensor] | None) -> None:
        """Take the parameters and buffers of rank 0's `sd`; the reverse of `full_state_dict`.

        Collective; what other ranks pass is ignored (None or an empty dict will do).

        Raises:
            ZerompiError: names or shapes are not the model's (on all ranks, nothing is changed).
        """
        self._full_values.load_state_dict(sd)

    # -- checkpoints ---------------------------------------------------------------------------

    def save(
        self,
        path: str | PathLike[str],
        *,
        extra: Mapping[str, Any] | None = None,
        blocking: bool = True,
        if_pending: Literal["wait", "refuse"] = "wait",
        keep: int = 0,
        include: Sequence[str | PathLike[str]] = (),
        max_shard_size: int = _DEFAULTS.max_shard_nbytes,
    ) -> None:
        """Write a checkpoint directory that is complete or absent. Collective.

        `model.safetensors` has the main weights and buffers under their Hugging Face names,
        `optimizer.safetensors` the optimizer's state as `<state>.<parameter name>`, `state.json`
        the rest: the optimizer's settings, the generators of all ranks, the loss scale, and
        `extra`, which must be JSON (rank 0's is kept). Every rank writes its own byte ranges; none
        holds the whole model.

        A path named `step-N` belongs to a series: the symbolic link `latest` beside it moves to it, after
        it is complete.

        With `blocking=False` each rank copies what it has to write, on the host, and a thread writes
        it while training goes on. The checkpoint is at `path` soon after the last rank has
        written, at the end of a step; `wait_for_save`, `save`, `load`, `close` and the end of the
        program wait for it. What goes wrong is logged at once and raised by the next of these.

        Args:
            path: on a file system that all ranks share.
            extra: JSON of the program's own: step, scheduler, position in the data.
            blocking: whether the checkpoint is complete when this returns; else a copy is written while
                training goes on, whose memory is kept for the next one, until `close`.
            if_pending: what to do while an earlier save is still going on: wait for it, or raise.
            keep: in a series, how many of the newest checkpoints stay; 0 keeps all.
            include: files that rank 0 copies into the directory, such as config.json.
            max_shard_size: bytes beyond which tensors go into further files, with an index.

        Raises:
            CheckpointError: it could not be written (on all ranks; what was at `path` is untouched), or
                an earlier one in the background could not.
            ValueError: an argument is out of its range.
            ZerompiError: an earlier save is going on, with `if_pending="refuse"`.
        """
        options = SaveOptions(extra, blocking, if_pending, keep, include, max_shard_size)
        self._checkpoints.save(path, options)

    def wait_for_save(self) -> None:
        """Wait until the checkpoint of a `save(blocking=False)` is at its path. Collective.

        Raises:
            CheckpointError: it could not be written (on all ranks; what was there is untouched).
        """
        self._checkpoints.wait()

    def load(
        self,
        path: str | PathLike[str],
        *,
        names: Callable[[str], str | None] | None = None,
        strict: bool = True,
    ) -> dict[str, Any]:
        """Load a checkpoint, or the weights of a Hugging Face directory; return `extra`. Collective.

        Each rank reads its slices only. Any number of ranks and any stage may have written it. Everything is
        read and verified before anything is overwritten. Param groups take the checkpoint's settings, but `fused`,
        `foreach` and `capturable`: which kernel steps depends on this program's device. Each rank's random
        generators go on as they were; at another number of ranks, see `zerompi.generators.states_of_rank`.

        Args:
            path: the directory.
            names: maps the stored name of a weight or buffer to the model's; None leaves it out.
            strict: whether model and optimizer have to match; else what matches is loaded, the
                rest stays as it is, and `skipped` tells what that is.

        Raises:
            ZerompiError: it is not of this model.
            CheckpointError: it cannot be read or is damaged.
                Both on all ranks, and nothing is overwritten.
        """
        return self._checkpoints.load(path, names, strict)

    # -- report --------------------------------------------------------------------------------

    def report(self) -> Report:
        """Traffic and time of the last step (up to the last `optimizer.step()`), memory now and at peak."""
        self._hooks.measure_gradients()
        self._optimizer.measure_states()
        return Report(
            traffic=self._step_traffic,
            memory=memory_report(self._units, self._optimizer.optimizer, self._context),
            time=self._step_times,
            spared=self._step_spared,
        )

    def _end_of_step(self) -> None:
        self._num_steps += 1
        progress.step, progress.phase = self._num_steps, "after the optimizer step"
        self._hooks.release_kept()
        self._hooks.gathers.end_of_step()
        traffic = self._context.world.traffic
        self._step_traffic = traffic.difference(self._traffic_mark)
        self._traffic_mark = traffic.snapshot()
        self._step_times = self._context.times.reset()
        self._step_spared, self._context.spared_nbytes = self._context.spared_nbytes, 0
        self._checkpoints.background.poll()

    # -- end -----------------------------------------------------------------------------------

    def close(self) -> None:
        """Remove the hooks and free the communicators. Collective; a second call does nothing.

        A checkpoint that is still being written is completed first. Until then the partition, and with it the model, stays alive. The model is left as it is:
        copies of the parameters can be taken before, with `full_state_dict` or inside `gathered`.

        Raises:
            CheckpointError: that checkpoint could not be written; everything is freed all the same.
        """
        if self._parts.is_closed:
            return
        with phase("close"):
            self._parts.agree("close of the partition")
        self._parts.is_closed = True
        try:
            self._checkpoints.background.finish()
        finally:
            self._release()

    def _release(self) -> None:
        self._checkpoints.background.close()
        self._context.thread.close()
        atexit.unregister(self._at_exit)
        self._hooks.remove()
        for layer in self._parts.linears:
            layer.remove()
        self._optimizer.remove()
        self._guards.remove()
        self._zero_grad.remove()
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
        """Tell ranks that still train that this one has ended; complete a checkpoint on its way."""
        if self._parts.is_closed:
            return
        try:
            if not launch.is_alone():
                self._parts.agree("end of the program")
            self._checkpoints.background.finish_at_exit()
        except Exception as error:  # nobody else would see it: atexit swallows exceptions
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
