"""A job in which the last rank ends early, in the way its argument names, while the others wait."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

import torch
from mpi4py import MPI

import zerompi

world = MPI.COMM_WORLD
WAY = sys.argv[1]


def fail() -> None:
    raise ValueError("broken on purpose")


def leave() -> None:
    if WAY == "exception":
        fail()
    elif WAY == "thread":
        threading.Thread(target=fail).start()
    elif WAY == "exit":
        sys.exit(3)
    elif WAY == "exit-message":
        sys.exit("no such file")
    elif WAY == "interrupt":
        signal.raise_signal(signal.SIGINT)
    elif WAY == "killed":
        os.kill(os.getpid(), signal.SIGKILL)


def train(steps: int) -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    zerompi.partition(model, optimizer, stage=3)
    for _ in range(steps):
        model(torch.ones(2, 8)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()


last = world.rank == world.size - 1
if WAY == "first-line":
    if last:
        fail()
    world.Barrier()
elif WAY.startswith("training-"):
    WAY = WAY.removeprefix("training-")
    train(3 if last else 1_000_000)
    leave()
elif WAY == "caught":
    try:
        sys.exit(3)
    except SystemExit:
        world.Barrier()
    print(f"rank {world.rank} went on", flush=True)
else:
    print(f"left at {time.time():.3f}", flush=True)
    if last:
        leave()
    if WAY == "thread" and last:
        time.sleep(60)
    world.Barrier()
