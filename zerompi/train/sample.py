"""Text that the model writes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from mpi4py import MPI
from torch import nn

from zerompi.train.devices import HOST
from zerompi.train.model import next_token_logits

_TEMPERATURE = 0.8  # below 1: fewer unlikely tokens than the model itself expects


def sample_continuation(
    model: nn.Module,
    prompt: Sequence[int],
    count: int,
    comm: MPI.Intracomm,
    *,
    device: torch.device = HOST,
    context: int,
    seed: int,
) -> list[int]:
    """`count` tokens after `prompt`, identical on all ranks.

    Collective: the forward passes gather the parameters unit by unit, so that a model that
    fits no single rank can be sampled. Rank 0 draws each token.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = list(prompt)
    was_training = model.training
    model.eval()
    with torch.no_grad():
        for _ in range(count):
            own = torch.tensor([tokens[-context:]], device=device)
            logits = next_token_logits(model, own)[0, -1].cpu()
            token = 0
            if comm.rank == 0:
                shares = torch.softmax(logits / _TEMPERATURE, dim=-1)
                token = int(torch.multinomial(shares, 1, generator=generator))
            tokens.append(comm.bcast(token, root=0))
    model.train(was_training)
    return tokens[len(prompt) :]
