"""A job in which one rank raises inside `join`: `join_fails.py PHASE RANK STAGE`.

It has the last of its batches then. Rank 1 has the most batches, rank 2 the fewest; two ranks are a node.
"""

from __future__ import annotations

import sys
import time

import torch
from mpi4py import MPI

import zerompi

PHASE = sys.argv[1]
RANK, STAGE = map(int, sys.argv[2:])
world = MPI.COMM_WORLD
num_batches = [2, 6, 1, 3][world.rank]


def fail_in(phase: str) -> None:
    if phase == PHASE and world.rank == RANK and batch == num_batches:
        print(f"fault at {time.time():.3f}", flush=True)
        raise ValueError("broken on purpose")


torch.manual_seed(0)
model = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(3)))
model[1].register_forward_pre_hook(lambda *args: fail_in("forward"))
model[1].register_full_backward_pre_hook(lambda *args: fail_in("backward"))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
optimizer.register_step_pre_hook(lambda *args: fail_in("optimizer"))
topology = zerompi.Topology(world, ranks_per_node=2)
batch = 0
with (
    zerompi.partition(
        model,
        optimizer,
        stage=STAGE,
        topology=topology,
        units=lambda module: isinstance(module, torch.nn.Linear),
    ) as zero,
    zero.join(),
):
    while batch < num_batches:
        batch += 1
        model(torch.ones(2, 8)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    fail_in("end")
print(f"rank {world.rank} is through", flush=True)
