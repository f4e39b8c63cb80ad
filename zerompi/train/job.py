"""Everything that a training run is made of, and how it is put together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import cos, pi
from pathlib import Path
from typing import cast

import numpy as np
import torch
from mpi4py import MPI
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

import zerompi
from zerompi import launch
from zerompi.precision import NonFinite
from zerompi.train import devices, huggingface
from zerompi.train.agreement import agree
from zerompi.train.config import InputError, TrainConfig
from zerompi.train.data import ByteCodec, Codec, Corpus, check_same_corpus, load_corpus
from zerompi.train.model import VOCABULARY, GPTConfig, make_gpt

_LAST_LR = 0.1  # of the peak


@dataclass(frozen=True)
class Job:
    """A run, ready to train.

    Attributes:
        config: as given.
        comm: all ranks of the run.
        topology: their nodes.
        device: on which this rank computes.
        corpus: the text.
        model: partitioned.
        optimizer: AdamW over the pieces.
        scheduler: warm-up and cosine decay.
        zero: the partition.
        num_steps: of the whole run, from step 1 on.
        rows: sequences of one forward pass of one rank.
        numel: elements of all parameters, before the partition.
    """

    config: TrainConfig
    comm: MPI.Intracomm
    topology: zerompi.Topology
    device: torch.device
    corpus: Corpus
    model: nn.Module
    optimizer: AdamW
    scheduler: LambdaLR
    zero: zerompi.Zero
    num_steps: int
    rows: int
    numel: int


def prepare(config: TrainConfig, comm: MPI.Intracomm) -> Job:
    """Read the text, make the model, and partition it. Collective.

    Raises:
        InputError: something in the configuration cannot be used; the same on all ranks.
    """
    topology = zerompi.Topology(comm)
    local_size = len(topology.ranks_of_node[topology.node_of[comm.rank]])
    torch.set_num_threads(launch.threads_per_rank(local_size))
    rows = agree(comm, lambda: config.micro_batch(comm.size))
    device = devices.choose(config.device, comm, share=config.share_devices)
    model, codec = agree(comm, lambda: _make_model(config))
    corpus = agree(comm, lambda: load_corpus(config.data, codec, config.context))
    check_same_corpus(corpus, comm)
    agree(comm, lambda: _check_vocabulary(corpus, _vocabulary(model)))
    units = agree(comm, lambda: _unit_predicate(config.units, model))
    num_steps = config.num_steps(len(corpus.train))
    optimizer = _make_optimizer(model, config, device)
    numel = sum(parameter.numel() for parameter in model.parameters())
    names = huggingface.names_in_files(model)  # before the partition takes the parameters

    torch.manual_seed(config.seed)  # rank 0 draws the initial values
    _move_buffers(model, device)
    zero = agree(comm, lambda: _partition(model, optimizer, config, comm, units, device))
    scheduler = LambdaLR(optimizer, lr_factor(config.warmup, num_steps))
    if config.model is not None:
        directory = config.model
        agree(comm, lambda: _load_weights(zero, directory, names))
        optimizer.state.clear()  # the directory may be a checkpoint of another run
        _apply_settings(optimizer, scheduler, config)
    # Dropout differs from rank to rank.
    own = np.random.Philox(key=config.seed, counter=[1, 0, 0, comm.rank])
    torch.manual_seed(int(own.random_raw()) >> 1)
    return Job(
        config,
        comm,
        topology,
        device,
        corpus,
        model,
        optimizer,
        scheduler,
        zero,
        num_steps,
        rows,
        numel,
    )


def _move_buffers(model: nn.Module, device: torch.device) -> None:
    """Put the buffers that have values on the device; the parameters have none yet."""
    for module in model.modules():
        for key, buffer in module._buffers.items():
            if buffer is not None and not buffer.is_meta:
                module._buffers[key] = buffer.to(device)


def _make_model(config: TrainConfig) -> tuple[nn.Module, Codec]:
    if config.model is not None:
        directory = Path(config.model)
        model = huggingface.make_model(
            directory,
            context=config.context,
            checkpoint_activations=config.checkpoint_activations,
        )
        return model, huggingface.make_codec(directory, _vocabulary(model))
    sizes = GPTConfig(
        layers=config.layers,
        width=config.width,
        heads=config.heads,
        checkpoint_activations=config.checkpoint_activations,
    )
    return make_gpt(sizes), ByteCodec()


def _vocabulary(model: nn.Module) -> int:
    """How many tokens `model` knows."""
    config = getattr(model, "config", None)
    return VOCABULARY if config is None else int(config.vocab_size)


def _check_vocabulary(corpus: Corpus, vocabulary: int) -> None:
    largest = int(max(corpus.train.max(), corpus.held_out.max()))
    if largest >= vocabulary:
        raise InputError(
            f"--model: expected tokens below the vocabulary of {vocabulary}, got token {largest} "
            f"from {corpus.codec.name}"
        )


def _unit_predicate(units: str | None, model: nn.Module) -> Callable[[nn.Module], bool] | None:
    if units is None:
        return None
    wanted = {name.strip() for name in units.split(",")}
    known = {type(module).__name__ for module in model.modules()}
    if not wanted <= known:
        raise InputError(
            f"--units: expected classes among {', '.join(sorted(known))}; got "
            f"{', '.join(sorted(wanted - known)) or 'none'}"
        )
    return lambda module: type(module).__name__ in wanted


def _partition(
    model: nn.Module,
    optimizer: AdamW,
    config: TrainConfig,
    comm: MPI.Intracomm,
    units: Callable[[nn.Module], bool] | None,
    device: torch.device,
) -> zerompi.Zero:
    shard_ranks = config.shard_ranks
    mixed = None
    if config.dtype != "float32":
        mixed = zerompi.MixedPrecision(param_dtype=getattr(torch, config.dtype))
    return zerompi.partition(
        model,
        optimizer,
        stage=config.stage,
        comm=comm,
        units=units,
        mixed_precision=mixed,
        shard_ranks=int(shard_ranks) if shard_ranks.isdigit() else shard_ranks,
        node_cache=config.node_cache,
        reshard_last=config.reshard_last,
        quantize=_quantize(config),
        nonfinite=cast("NonFinite", config.nonfinite),
        device=device,
    )


def _quantize(config: TrainConfig) -> zerompi.Quantize | None:
    if not config.is_quantized:
        return None
    return zerompi.Quantize(
        weights=config.quantize_weights,  # type: ignore[arg-type]
        gradients=config.quantize_gradients,  # type: ignore[arg-type]
        block=config.quantize_block,
        error_feedback=config.error_feedback,
    )


def _load_weights(zero: zerompi.Zero, directory: str, names: Callable[[str], str | None]) -> None:
    try:
        zero.load(directory, names=names)
    except zerompi.ZerompiError as error:
        raise InputError(f"--model: {directory}: {error}") from error


# -- optimizer ---------------------------------------------------------------------------------


def _make_optimizer(model: nn.Module, config: TrainConfig, device: torch.device) -> AdamW:
    """AdamW that decays matrices and leaves vectors alone; on the host in one pass through memory."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in parameters if p.dim() >= 2]
    vectors = [p for p in parameters if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95))
    if device.type == "cpu":
        # Parameters are on no device yet, which AdamW(fused=True) of torch 2.4 refuses.
        for settings in (optimizer.defaults, *optimizer.param_groups):
            settings["fused"] = True
    return optimizer


def lr_factor(warmup: int, num_steps: int) -> Callable[[int], float]:
    """The learning rate as a part of its peak: linear warm-up, then a cosine down to a tenth."""

    def factor(done: int) -> float:
        if done < warmup:
            return (done + 1) / warmup
        progress = min(1.0, (done - warmup) / max(1, num_steps - warmup))
        return _LAST_LR + (1 - _LAST_LR) * (1 + cos(pi * progress)) / 2

    return factor


def _apply_settings(optimizer: AdamW, scheduler: LambdaLR, config: TrainConfig) -> None:
    """Let the configuration, not what was loaded, decide the learning rate and the decay."""
    scheduler.base_lrs = [config.learning_rate] * len(optimizer.param_groups)
    for group, factor, decay in zip(
        optimizer.param_groups, scheduler.lr_lambdas, (config.weight_decay, 0.0), strict=True
    ):
        group["initial_lr"] = config.learning_rate
        group["lr"] = config.learning_rate * factor(scheduler.last_epoch)
        group["weight_decay"] = decay


def restore(job: Job, path: Path) -> int:
    """Continue from the checkpoint at `path`; return how many steps it has behind it. Collective.

    Raises:
        InputError: it is no checkpoint of this model and run; the same on all ranks.
    """
    extra = agree(job.comm, lambda: job.zero.load(path))
    if "step" not in extra or "scheduler" not in extra:
        raise InputError(f"--resume: {path}: expected a checkpoint of zerompi train, got another")
    job.scheduler.load_state_dict(extra["scheduler"])
    _apply_settings(job.optimizer, job.scheduler, job.config)
    return int(extra["step"])
