"""The loss on held-out text."""

from __future__ import annotations

from math import ceil, fsum, log
from typing import NamedTuple

import torch
import torch.nn.functional as F
from mpi4py import MPI
from torch import nn

from zerompi.train.data import Corpus, held_out_starts, windows
from zerompi.train.devices import HOST
from zerompi.train.model import next_token_logits


class Evaluation(NamedTuple):
    """Mean over held-out tokens: nats per token, and bits per byte of text."""

    loss: float
    bits_per_byte: float
    num_windows: int


def evaluate(
    model: nn.Module,
    corpus: Corpus,
    comm: MPI.Intracomm,
    *,
    device: torch.device = HOST,
    context: int,
    num_windows: int,
    rows: int,
) -> Evaluation:
    """The loss over fixed windows of the held-out text.

    Collective. The windows are the same for any number of ranks, and so is the order of summation.
    Where they do not divide evenly a rank repeats the first window, for forward passes are
    collective too, and its loss is left out.

    Args:
        model: partitioned; it is left in the mode (training or not) that it is in.
        corpus: the text.
        comm: the ranks that share the windows.
        device: on which the model computes.
        context: tokens of a window.
        num_windows: how many, at most.
        rows: windows of one forward pass of one rank.
    """
    starts = held_out_starts(len(corpus.held_out), context, num_windows)
    was_training = model.training
    model.eval()
    sums: dict[int, float] = {}
    with torch.no_grad():
        for turn in range(ceil(len(starts) / (comm.size * rows))):
            first = (turn * comm.size + comm.rank) * rows
            own = range(first, first + rows)
            chosen = [starts[index] if index < len(starts) else starts[0] for index in own]
            inputs, targets = windows(corpus.held_out, chosen, context)
            logits = next_token_logits(model, inputs.to(device))
            losses = F.cross_entropy(logits.transpose(1, 2), targets.to(device), reduction="none")
            for index, total in zip(own, losses.double().sum(1).tolist(), strict=True):
                if index < len(starts):
                    sums[index] = total
    model.train(was_training)
    merged = {index: total for part in comm.allgather(sums) for index, total in part.items()}
    loss = fsum(merged.values()) / (len(starts) * context)
    tokens_per_byte = len(corpus.held_out) / corpus.held_out_bytes
    return Evaluation(loss, loss / log(2) * tokens_per_byte, len(starts))
