"""All settings of `zerompi train`: one field each, with its default, help and checks."""

from __future__ import annotations

import sys
import types
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from importlib import import_module
from math import ceil
from pathlib import Path
from typing import Any

_toml = import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")

DTYPES = ("float32", "bfloat16", "float16")
QUANTIZED = (None, "int8", "int4")
DEVICES = ("auto", "cpu", "cuda")
PROGRESS = ("auto", "bar", "lines", "none")
DEFAULT_STEPS = 360
_LR_FROM_SCRATCH = 3e-3
_LR_FINE_TUNING = 5e-5


class InputError(ValueError):
    """The user's input cannot be worked with; the message is one line for the user."""


def _option(default: Any, panel: str, text: str) -> Any:
    return field(default=default, metadata={"panel": panel, "help": text})


_DATA, _MODEL, _ZERO = "Data", "Model", "Partition"
_TRAINING, _EVALUATION, _OUTPUT = "Training", "Evaluation", "Output and checkpoints"


@dataclass(frozen=True)
class TrainConfig:
    """What `zerompi train` does. Field `eval_every` is option `--eval-every`, TOML `eval-every`."""

    data: str | None = _option(
        None, _DATA, "Text file, or directory of text files. None: Python's own documentation."
    )
    seed: int = _option(0, _DATA, "Seed of initial values, data order and sampling.")
    context: int = _option(128, _DATA, "Tokens of one sequence.")
    batch: int = _option(
        24, _DATA, "Sequences of one step, of all ranks together: a multiple of ranks x accumulate."
    )

    model: str | None = _option(
        None,
        _MODEL,
        "Hugging Face directory (config.json, safetensors) to fine-tune. None: a byte GPT.",
    )
    layers: int = _option(4, _MODEL, "Blocks of the byte GPT.")
    width: int = _option(192, _MODEL, "Width of the byte GPT.")
    heads: int = _option(6, _MODEL, "Attention heads of the byte GPT.")
    checkpoint_activations: bool = _option(
        False, _MODEL, "Compute each block's activations again in backward instead of keeping them."
    )

    device: str = _option(
        "auto",
        _ZERO,
        "Where to compute: cpu; cuda, each rank on a device of its own; auto: cuda where all have one.",
    )
    share_devices: bool = _option(False, _ZERO, "Let several ranks compute on one device.")
    stage: int = _option(
        3, _ZERO, "ZeRO stage: 0 replicates; 1, 2, 3 shard optimizer, + gradients, + parameters."
    )
    dtype: str = _option(
        "float32", _ZERO, "Dtype of parameters and compute: float32, bfloat16 or float16."
    )
    units: str | None = _option(
        None, _ZERO, "Classes of the modules that are gathered together, comma separated."
    )
    shard_ranks: str = _option(
        "world", _ZERO, "Ranks that share one copy: world, node, or a divisor of the ranks."
    )
    node_cache: bool = _option(
        False,
        _ZERO,
        "At stage 3 a node keeps what it has gathered until the parameters change (hpZ).",
    )
    reshard_last: bool = _option(
        True,
        _ZERO,
        "At stage 3 free what a forward uses last, and gather it again for the backward.",
    )
    quantize_weights: str | None = _option(
        None, _ZERO, "At stage 3, gather parameters quantized (qwZ): int8 or int4."
    )
    quantize_gradients: str | None = _option(
        None, _ZERO, "At stages 1 to 3, reduce gradients quantized (qgZ): int8 or int4."
    )
    quantize_block: int = _option(256, _ZERO, "Quantized elements that share a scale; even.")
    error_feedback: bool = _option(
        False, _ZERO, "Add what the quantization of gradients has lost to the next gradients."
    )
    accumulate: int = _option(1, _ZERO, "Forward and backward passes of each rank per step.")

    steps: int | None = _option(
        None, _TRAINING, f"Steps to train; {DEFAULT_STEPS} if neither is given."
    )
    epochs: float | None = _option(None, _TRAINING, "Instead of steps: times the size of the text.")
    lr: float | None = _option(
        None,
        _TRAINING,
        f"Peak learning rate; {_LR_FROM_SCRATCH} from scratch, {_LR_FINE_TUNING} with --model.",
    )
    warmup: int = _option(40, _TRAINING, "Steps of linear warm-up before the cosine decay.")
    weight_decay: float = _option(0.1, _TRAINING, "AdamW's decay of matrices; vectors have none.")
    nonfinite: str = _option(
        "raise",
        _TRAINING,
        "At a gradient that is NaN or infinite: raise, skip the step, or ignore.",
    )
    clip: float = _option(1.0, _TRAINING, "Largest norm of the gradient; 0 does not clip.")
    max_time: float | None = _option(
        None,
        _TRAINING,
        "Seconds after which everything is saved and the run has stopped; 0: no limit. None: what the "
        "batch system tells.",
    )
    margin: float | None = _option(
        None,
        _TRAINING,
        "Seconds of that time that are kept for the checkpoint. None: 120, or 5 % of the time.",
    )

    eval_every: int = _option(
        100, _EVALUATION, "Steps between evaluations; 0 evaluates at the end."
    )
    eval_batches: int = _option(16, _EVALUATION, "Held-out batches of one evaluation, at most.")
    sample: int = _option(256, _EVALUATION, "Tokens of the continuation sampled at the end.")

    out: str = _option("zerompi-out", _OUTPUT, "Directory of metrics, summary and checkpoints.")
    save_every: int = _option(0, _OUTPUT, "Steps between checkpoints; 0: when stopped only.")
    save_in_background: bool = _option(
        False, _OUTPUT, "Train on while a copy of the state is written; takes the memory of one."
    )
    keep: int = _option(2, _OUTPUT, "Newest checkpoints that are kept; 0 keeps all.")
    resume: str | None = _option(
        None,
        _OUTPUT,
        "Continue from a checkpoint directory, or (auto, latest, or no value) from the latest in "
        "--out; from the beginning if there is none.",
    )
    progress: str = _option(
        "auto", _OUTPUT, "bar, lines, none; auto is a bar where the launcher has a terminal."
    )

    def __post_init__(self) -> None:
        """Refuse values that no run can have."""
        for name in ("context", "batch", "layers", "width", "heads", "accumulate", "eval_batches"):
            self._require(name, getattr(self, name) >= 1, "a positive number")
        for name in ("seed", "warmup", "eval_every", "sample", "save_every", "keep"):
            self._require(name, getattr(self, name) >= 0, "a number that is not negative")
        for name in ("weight_decay", "clip", "max_time", "margin"):
            value = getattr(self, name)
            self._require(name, value is None or 0 <= value < float("inf"), "0 or more")
        for name in ("steps", "epochs", "lr"):
            value = getattr(self, name)
            self._require(name, value is None or 0 < value < float("inf"), "a positive number")
        self._require("seed", self.seed < 2**63, "a number below 2^63")
        self._require("stage", self.stage in (0, 1, 2, 3), "0, 1, 2 or 3")
        self._require("dtype", self.dtype in DTYPES, " or ".join(DTYPES))
        self._require("device", self.device in DEVICES, " or ".join(DEVICES))
        self._require("progress", self.progress in PROGRESS, " or ".join(PROGRESS))
        self._require(
            "steps", self.steps is None or self.epochs is None, "--steps or --epochs, not both"
        )
        if self.model is None:
            half = self.width / 2
            self._require("heads", half % self.heads == 0, f"a divisor of --width / 2 = {half:g}")
        fits = self.stage == 3 or not self.node_cache
        self._require("node_cache", fits, "False below stage 3")
        for name, lowest in (("quantize_weights", 3), ("quantize_gradients", 1)):
            value = getattr(self, name)
            self._require(name, value in QUANTIZED, "int8 or int4")
            self._require(name, value is None or self.stage >= lowest, f"none below stage {lowest}")
        fits = self.quantize_block > 0 and self.quantize_block % 2 == 0
        self._require("quantize_block", fits, "a positive even number")
        fits = self.quantize_gradients is not None or not self.error_feedback
        self._require("error_feedback", fits, "False without --quantize-gradients")
        known = self.shard_ranks in ("world", "node") or self.shard_ranks.isdigit()
        self._require("shard_ranks", known, "world, node or a number")

    def _require(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise InputError(f"{option_name(name)}: expected {expected}, got {getattr(self, name)}")

    @property
    def learning_rate(self) -> float:
        """The peak learning rate."""
        if self.lr is not None:
            return self.lr
        return _LR_FROM_SCRATCH if self.model is None else _LR_FINE_TUNING

    @property
    def is_quantized(self) -> bool:
        """Whether any messages are quantized."""
        return self.quantize_weights is not None or self.quantize_gradients is not None

    @property
    def tokens_per_step(self) -> int:
        """Tokens that all ranks together train on in one step."""
        return self.batch * self.context

    def num_steps(self, num_tokens: int) -> int:
        """Steps of the whole run over a training text of `num_tokens`."""
        if self.epochs is not None:
            return max(1, ceil(self.epochs * num_tokens / self.tokens_per_step))
        return DEFAULT_STEPS if self.steps is None else self.steps

    def micro_batch(self, num_ranks: int) -> int:
        """Sequences of one forward pass of one rank.

        Raises:
            InputError: the batch cannot be divided evenly.
        """
        passes = num_ranks * self.accumulate
        if self.batch % passes:
            raise InputError(
                f"--batch: expected a multiple of {passes} ({num_ranks} ranks x {self.accumulate} "
                f"passes), got {self.batch}"
            )
        return self.batch // passes

    def as_dict(self) -> dict[str, Any]:
        """All values by field name."""
        return asdict(self)


def option_name(name: str) -> str:
    """The option of a field: eval_every -> --eval-every."""
    return "--" + name.replace("_", "-")


def make_config(given: Mapping[str, Any], file: Mapping[str, Any] | None = None) -> TrainConfig:
    """The configuration of a TOML table, the options `given` (None: not given) winning over it.

    Raises:
        InputError: an unknown key, or a value that a field cannot have.
    """
    values = _checked(file or {})
    values.update({name: value for name, value in given.items() if value is not None})
    return TrainConfig(**values)


def read_toml(path: Path) -> dict[str, Any]:
    """The table of a TOML file.

    Raises:
        InputError: it cannot be read.
    """
    try:
        table: dict[str, Any] = _toml.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"--config: {path}: {error.strerror}") from None
    except ValueError as error:  # not TOML, or not UTF-8
        raise InputError(f"--config: {path}: {error}") from None
    return table


def _checked(table: Mapping[str, Any]) -> dict[str, Any]:
    kinds = field_types()
    values = {}
    for key, value in table.items():
        name = key.replace("-", "_")
        if name not in kinds:
            known = ", ".join(sorted(kind.replace("_", "-") for kind in kinds))
            raise InputError(f"--config: unknown key {key!r}; expected one of {known}")
        kind = kinds[name]
        if kind is str and name == "shard_ranks" and isinstance(value, int):
            value = str(value)
        fits = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value, fits = float(value), True
        if not fits:
            raise InputError(f"--config: {key}: expected {kind.__name__}, got {value!r}")
        values[name] = value
    return values


def field_types() -> dict[str, type]:
    """The type of each field, without None."""
    hints = typing.get_type_hints(TrainConfig)
    kinds: dict[str, type] = {}
    for entry in fields(TrainConfig):
        hint = hints[entry.name]
        if isinstance(hint, types.UnionType):
            hint = next(part for part in typing.get_args(hint) if part is not types.NoneType)
        kinds[entry.name] = hint
    return kinds
