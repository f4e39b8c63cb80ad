"""The user's optimizer steps the pieces: substitution, step hooks, gradient norm and clipping."""

from __future__ import annotations

import copy
import logging
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from hashlib import blake2b
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from zerompi.activity import progress
from zerompi.blocked_step import block
from zerompi.context import Context
from zerompi.errors import MismatchError, NonFiniteError, ZerompiError
from zerompi.gradient_norms import is_finite, norm, power, squares_on_device
from zerompi.gradients import cast, named
from zerompi.launch import raised_by_all
from zerompi.placement import Placement
from zerompi.precision import LossScaler
from zerompi.report import storage_nbytes
from zerompi.schedule import Refreshes
from zerompi.segment import Segment
from zerompi.unit import Unit

# Of a 0-dim parameter every state is 0-dim; torch.optim's step counts and factors are told by name.
_SCALAR_STATES = frozenset({"step", "mu_product", "eta", "mu"})

_log = logging.getLogger("zerompi")


class PieceOptimizer:
    """Binds an optimizer to the pieces of a partition.

    The parameters in `optimizer.param_groups` are replaced by this rank's pieces, their state by
    the pieces of that state; everything else in the groups stays as it is. A pre-hook of `step`
    prepares the gradients, a post-hook refreshes the parameters.

    Args:
        optimizer: the user's, or None.
        units: of the partition.
        context: of the partition.
        scaler: of the loss, or None.
        refreshes: start after a step where they go on beside what follows.
        end_of_step: called after each step, before these.

    Attributes:
        skipped_steps: how many steps were skipped because a gradient was not finite.
    """

    def __init__(
        self,
        optimizer: Optimizer | None,
        units: Sequence[Unit],
        context: Context,
        scaler: LossScaler | None,
        refreshes: Refreshes,
        end_of_step: Callable[[], None],
    ) -> None:
        self.optimizer = optimizer
        self.units = units
        self.context = context
        self.scaler = scaler
        self.segments = [segment for unit in units for segment in unit.trainable]
        self.skipped_steps = 0
        self._refreshes = refreshes
        self._end_of_step = end_of_step
        self._casts = ExitStack()
        self._skipped: list[tuple[nn.Parameter, Tensor]] = []
        self._handles: list[RemovableHandle] = []
        self._unblock: Callable[[], None] = lambda: None
        if optimizer is not None:
            self._substitute(optimizer)
            self._unblock = block(optimizer)
            self._handles = [
                optimizer.register_step_pre_hook(self._before_step),
                optimizer.register_step_post_hook(self._after_step),
            ]
            if context.stage.optimizer_state is Placement.SHARD:
                self._handles += [
                    optimizer.register_state_dict_pre_hook(_refuse_state_dict),
                    optimizer.register_load_state_dict_pre_hook(_refuse_load_state_dict),
                ]

    def remove(self) -> None:
        """Take the hooks away; the optimizer keeps the pieces."""
        self._unblock()
        for handle in self._handles:
            handle.remove()

    def _substitute(self, optimizer: Optimizer) -> None:
        owner: dict[int, tuple[Segment, int]] = {
            id(parameter): (segment, index)
            for unit in self.units
            for segment in unit.segments
            for index, parameter in enumerate(segment.parameters)
        }
        for group in optimizer.param_groups:
            pieces = []
            for parameter in group["params"]:
                segment, index = owner[id(parameter)]
                piece = segment.pieces[index]
                pieces.append(piece)
                state = optimizer.state.pop(parameter, None)
                if state is not None:
                    optimizer.state[piece] = {
                        key: segment.state_piece(index, value)
                        if is_elementwise_state(key, value, parameter.shape)
                        else value
                        for key, value in state.items()
                    }
            group["params"][:] = pieces  # in place: LBFGS keeps the list

    # -- step ----------------------------------------------------------------------------------

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        progress.phase = "optimizer step"
        deferred = [s for s in self.segments if s.gradients.dtype is not s.main_dtype]
        closure = kwargs.get("closure") or next(iter(args[1:]), None)
        joined = self.context.attendance.is_open
        if closure is not None and (deferred or self.scaler or joined):
            raise ValueError(
                "closure: expected None with a loss scale, with a reduce_dtype other than the main "
                "weights' dtype, or inside join(), got a function; call backward() before step()"
            )
        for unit in self.units:
            for segment in unit.segments:
                for name, parameter in zip(segment.names, segment.parameters, strict=True):
                    if parameter.grad is not None:
                        raise ZerompiError(
                            f"{name}.grad was set by hand and would be ignored: the gradients of a "
                            "partitioned model are those of the optimizer's pieces"
                        )
        if self._refreshes.are_ahead:  # which makes the parameters anew
            for unit in self.units:
                unit.check_untouched()
        self._casts.close()  # a step that raised has left them open
        if self._has_to_be_skipped():
            # Without gradients torch's own code leaves weights, states and step counts alone.
            for segment in self.segments:
                for piece in segment.pieces:
                    if piece.grad is not None:
                        self._skipped.append((piece, piece.grad))
                        piece.grad = None
            return
        self._casts.enter_context(cast(deferred))
        cast_nbytes = sum(segment.main.nbytes for segment in deferred)
        self._casts.enter_context(self.context.memory.borrowed(cast_nbytes))
        self._casts.enter_context(self.context.times.phase("optimizer"))

    def _has_to_be_skipped(self) -> bool:
        """Whether any rank has a gradient that is not finite, and the step is left out for that.

        Collective over the world, also if nobody wants to know: a rank that steps alone is noticed.
        """
        policy, scaler = self.context.nonfinite, self.scaler
        faulty = [] if policy == "ignore" and scaler is None else self._faulty_parameters()
        self.context.settle()
        self.context.free_slots()  # the optimizer may need room
        self.context.attendance.announce("optimizer step", "step", self.settings())
        flags = self.context.world.agree("optimizer step", self._digest() << 1 | bool(faulty))
        if len({flag >> 1 for flag in flags}) > 1:
            self._refuse_settings()
        is_faulty = any(flag & 1 for flag in flags)
        is_expected = False
        if scaler is not None:
            is_expected = scaler.explains_overflow or policy == "ignore"
            scaler.update(overflow=is_faulty)
        if is_faulty and not is_expected:
            text = self._describe(faulty)
            if policy == "raise":
                error = NonFiniteError(
                    f"{text}; the step was not taken: nonfinite='skip' leaves such steps out"
                )
                raise raised_by_all(error, self.context.world.rank)
            if self.context.world.rank == 0:
                _log.warning("%s; the optimizer step is skipped", text)
        self.skipped_steps += is_faulty
        return is_faulty

    def _faulty_parameters(self) -> list[str]:
        """The parameters of which this rank has a gradient that is not finite."""
        gradients = list(named(self.segments))
        squares = self._squares_on_device([gradient for _, gradient in gradients])
        if squares is not None and all(map(math.isfinite, squares)):
            return []
        return [name for name, gradient in gradients if not is_finite(gradient)]

    def _squares_on_device(self, gradients: Sequence[Tensor]) -> list[float] | None:
        """See `squares_on_device`; None on the host."""
        is_device = self.context.shard_group.space.is_device
        return squares_on_device(gradients) if is_device else None

    def _describe(self, faulty: Sequence[str]) -> str:
        """Name all ranks' faulty parameters. Collective over the world."""
        found = set().union(*self.context.world.comm.allgather(faulty))
        known = [
            name
            for segment in self.segments
            for name, piece in zip(segment.names, segment.pieces, strict=True)
            if piece.grad is not None
        ]
        names = [name for name in known if name in found]
        text = f"the gradient of {', '.join(names[:5])} is not finite"
        if len(names) > 5:
            text = (
                f"the gradients of {', '.join(names[:5])} and {len(names) - 5} more are not finite"
            )
        if len(names) == len(known):
            text += " (no gradient is: perhaps the loss was not)"
        return text

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        skipped = bool(self._skipped)
        for piece, gradient in self._skipped:
            piece.grad = gradient
        self._skipped.clear()
        self._casts.close()
        if not skipped and not self._refreshes.are_ahead:
            self.refresh()
        self.measure_states()
        self._end_of_step()
        if not skipped and self._refreshes.are_ahead:
            self._refreshes.start()

    def refresh(self, *, everything: bool = False) -> None:
        """Bring the parameters up to date with the main weights. Collective.

        Those that are trained; with `everything` the frozen ones, too.
        """
        self.context.settle()
        for unit in self.units:
            unit.reshard()  # what a failed backward pass has left is going to be out of date
        with self.context.times.phase("refresh"):
            for unit in self.units:
                unit.refresh(everything=everything)
            if any(unit.is_resident for unit in self.units):
                self.context.world.agree("end of the refresh of the parameters")

    # -- settings ------------------------------------------------------------------------------

    def _numbers(self) -> list[tuple[int, str, float]]:
        """The settings that are numbers, with their groups and names."""
        return [
            (index, key, float(value))
            for index, group in enumerate(self.settings())
            for key, value in group.items()
            if isinstance(value, (int, float))
            or (isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex())
        ]

    def _digest(self) -> int:
        """63 bits that tell whether ranks have the same numbers."""
        digest = blake2b(repr(self._numbers()).encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") >> 1

    def _refuse_settings(self) -> None:
        """Raise on all ranks. Collective over the world."""
        world = self.context.world
        raise raised_by_all(_difference(world.comm.allgather(self._numbers())), world.rank)

    def settings(self) -> list[dict[str, Any]]:
        """The settings of each parameter group: learning rate and the like."""
        if self.optimizer is None:
            return []
        return [
            {key: value for key, value in group.items() if key != "params"}
            for group in self.optimizer.param_groups
        ]

    def apply_settings(self, settings: Sequence[Mapping[str, Any]]) -> None:
        """The reverse of `settings`."""
        if self.optimizer is not None:
            for group, values in zip(self.optimizer.param_groups, settings, strict=True):
                group.update(values)

    def measure_states(self) -> None:
        """Bring the optimizer states' entry of the memory ledger up to date."""
        tensors = [s.main for s in self.segments if s.main_dtype is not s.dtype]
        if self.optimizer is not None:
            for state in self.optimizer.state.values():
                tensors += [value for value in state.values() if isinstance(value, Tensor)]
        self.context.memory.set("optimizer_states", storage_nbytes(tensors))

    # -- norm ----------------------------------------------------------------------------------

    def clip_grad_norm_(self, max_norm: float, norm_type: float) -> Tensor:
        """Scale all gradients so that their total norm is at most `max_norm`. Collective.

        Returns:
            The total norm before clipping: 0-dim, identical on all ranks.
        """
        if not norm_type > 0:
            raise ValueError(f"norm_type: expected a positive number or inf, got {norm_type}")
        self.context.settle()
        self.context.attendance.announce(
            f"norm of the gradients of type {norm_type}, clipped at {max_norm}",
            "clip",
            float(max_norm),
            float(norm_type),
        )
        gradients = [gradient for _, gradient in named(self.segments)]
        total = self._total_norm(gradients, float(norm_type))
        coefficient = float(min(1.0, float(max_norm) / (total + 1e-6)))
        if not math.isfinite(total) and self.context.nonfinite != "ignore":
            coefficient = 1.0  # as the gradients are, the step will tell which is at fault
        elif math.isnan(total):
            coefficient = math.nan
        if gradients and coefficient != 1.0:
            torch._foreach_mul_(gradients, coefficient)
        wide = any(s.main_dtype in (torch.float64, torch.complex128) for s in self.segments)
        return torch.tensor(total, dtype=torch.float64 if wide else torch.float32)

    def _total_norm(self, gradients: Sequence[Tensor], norm_type: float) -> float:
        largest = math.isinf(norm_type)
        powers = None if largest or norm_type != 2.0 else self._squares_on_device(gradients)
        if powers is None:
            powers = [norm(g, norm_type) for g in gradients if g.numel()]
            if not largest:
                powers = [power(n, norm_type) for n in powers]
        local = max(powers, default=0.0) if largest else math.fsum(powers)
        if any(math.isnan(number) for number in powers):
            local = math.nan
        self.context.world.agree("norm of the gradients")
        parts = [local]
        if self.context.stage.optimizer_state is Placement.SHARD:
            parts = self.context.shard_group.comm.allgather(local)
        if any(math.isnan(part) for part in parts):
            return math.nan
        return max(parts) if largest else power(math.fsum(parts), 1.0 / norm_type)


def _difference(everyone: Sequence[Sequence[tuple[int, str, float]]]) -> MismatchError:
    """The error that tells in what the numbers of a rank differ from those of rank 0."""
    for rank, numbers in enumerate(everyone):
        for ours, theirs in zip(everyone[0], numbers, strict=False):
            if repr(ours) != repr(theirs):
                group, key, value = ours
                return MismatchError(
                    f"ranks disagree on the settings of the optimizer: rank 0 has {key} {value} in "
                    f"param group {group}, rank {rank} has {theirs[1]} {theirs[2]}; each would step "
                    "its own pieces with these"
                )
    return MismatchError("ranks disagree on the settings of the optimizer: some have more of them")


def _refuse_state_dict(optimizer: Optimizer) -> None:
    raise ZerompiError(
        "optimizer.state_dict() of a partitioned optimizer would hold this rank's pieces only; use "
        "zero.save(...)"
    )


def _refuse_load_state_dict(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    raise ZerompiError(
        "optimizer.load_state_dict() does not cut the states into pieces; use zero.load(...), or call "
        "it before zerompi.partition"
    )


def is_elementwise_state(key: str, value: Any, shape: Sequence[int]) -> bool:
    """Whether an optimizer state has an element for every element of a parameter of this shape."""
    return isinstance(value, Tensor) and is_elementwise_shape(key, value.shape, shape)


def is_elementwise_shape(key: str, state_shape: Sequence[int], shape: Sequence[int]) -> bool:
    """The same, from shapes alone."""
    return tuple(state_shape) == tuple(shape) and (bool(shape) or key not in _SCALAR_STATES)


def check_optimizer(optimizer: Optimizer, model: nn.Module, *, sharded: bool) -> None:
    """Refuse an optimizer that partition cannot serve, before anything is changed.

    Raises:
        TypeError: not a torch optimizer, or (where states are sharded) one that does not treat every element
            by itself, so that pieces of a parameter would be updated differently from the whole.
        ValueError: it holds a parameter that is not the model's.
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"optimizer: expected a torch.optim.Optimizer or None, got {type(optimizer).__name__}"
        )
    known = {id(parameter) for parameter in model.parameters()}
    for number, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            if id(parameter) not in known:
                raise ValueError(
                    f"optimizer: expected parameters of the model, got one of shape "
                    f"{tuple(parameter.shape)} in param group {number} that is not"
                )
        if sharded and not _is_elementwise(optimizer, group):
            raise TypeError(
                f"optimizer: expected an elementwise optimizer at stages 1 to 3, got "
                f"{type(optimizer).__name__}, which updates an element differently when its "
                "parameter is cut into pieces (it needs whole tensors); use stage=0 for it"
            )


def _is_elementwise(optimizer: Optimizer, group: dict[str, Any]) -> bool:
    """Try it: three steps on a matrix and on the same numbers cut into pieces must agree."""
    generator = torch.Generator().manual_seed(0)
    device = _device_of(group["params"])
    start = torch.randn(6, 5, generator=generator).to(device)
    gradients = [torch.randn(6, 5, generator=generator).to(device) for _ in range(3)]
    cuts = [0, 7, 7, 30]

    def run(parameters: list[nn.Parameter], parts: list[list[Tensor]]) -> Tensor:
        trial = object.__new__(type(optimizer))
        for name, value in vars(optimizer).items():
            # Containers of the optimizer's own, say a list of losses, are not the trial's to fill.
            own = isinstance(value, (dict, list, set)) and name not in ("state", "param_groups")
            vars(trial)[name] = copy.copy(value) if own else value
        vars(trial).pop("_init_group", None)  # bound to the optimizer itself
        trial.state = defaultdict(dict)
        trial.param_groups = [{**group, "params": parameters}]
        if "lr" in group:
            trial.param_groups[0]["lr"] = (
                1e-2  # a warm-up may have set 0, which would prove nothing
            )
        for hooks in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"):
            trial.__dict__[hooks] = {}
        for step in parts:
            for parameter, gradient in zip(parameters, step, strict=True):
                parameter.grad = gradient.clone()
            type(optimizer).step(trial)
        return torch.cat([parameter.detach().flatten() for parameter in parameters])

    def pieces(tensor: Tensor) -> list[Tensor]:
        flat = tensor.flatten()
        return [flat[a:b] for a, b in pairwise(cuts)]

    try:
        whole = run([nn.Parameter(start.clone())], [[gradient] for gradient in gradients])
        parts = run(
            [nn.Parameter(part.clone()) for part in pieces(start)],
            [pieces(gradient) for gradient in gradients],
        )
    except Exception as error:
        raise ZerompiError(
            f"optimizer: a trial step of {type(optimizer).__name__} on 1-D pieces of a parameter "
            f"failed ({type(error).__name__}: {error}); use stage=0 for it"
        ) from error
    return torch.allclose(whole, parts, rtol=1e-5, atol=1e-7)


def _device_of(parameters: Sequence[Tensor]) -> torch.device:
    """Where these parameters are going to be stepped."""
    devices = [p.device for p in parameters if not p.is_meta]
    return devices[0] if devices else torch.device("cpu")
