"""A job whose last rank does something else, in the way its argument names."""

from __future__ import annotations

import sys
import time

import torch
from mpi4py import MPI

import zerompi
from zerompi.collectives import Group, all_gather

world = MPI.COMM_WORLD
WAY = sys.argv[1]
IS_LAST = world.rank == world.size - 1


def step(scale: float = 1.0) -> None:
    (scale * model(torch.ones(2, 8))).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def differ() -> None:
    if IS_LAST:
        zero.full_state_dict()
    else:
        step()


torch.manual_seed(0)
model = torch.nn.Linear(8, 9 if WAY == "model" and IS_LAST else 8)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
group = Group()
zero = zerompi.partition(model, optimizer, stage=7 if WAY == "argument" else 3)
for _ in range(3):
    step()
if WAY == "order":
    differ()
elif WAY == "shape":
    numel = 5 if IS_LAST else 4
    all_gather(torch.zeros(numel), torch.zeros(numel * world.size), group)
elif WAY == "refusal":
    all_gather(torch.zeros(4), torch.zeros(3 if IS_LAST else 4 * world.size), group)
elif WAY == "cause":
    try:
        if IS_LAST:
            raise OSError("no such batch")
    finally:
        if IS_LAST:
            zero.close()
    step()
elif WAY == "settings":
    optimizer.param_groups[0]["lr"] += IS_LAST
    step()
elif WAY == "nonfinite":
    step(float("nan"))
elif WAY == "caught":
    try:
        differ()
    except zerompi.MismatchError:
        if world.rank:
            raise
        time.sleep(60)
