"""A job with a fault: `fault_at.py PHASE KIND DIRECTORY`.

In its third step the last rank meets a fault of that kind in that phase. After the second one a
checkpoint was saved.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from mpi4py import MPI

import zerompi
from zerompi import gather
from zerompi.checkpoint import writer

PHASE, KIND, DIRECTORY = sys.argv[1:]
IS_LAST = MPI.COMM_WORLD.rank == MPI.COMM_WORLD.size - 1


def fault() -> None:
    print(f"fault at {time.time():.3f}", flush=True)
    if KIND == "exception":
        raise ValueError("broken on purpose")
    if KIND == "memory":
        torch.empty(1 << 60)
    elif KIND == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif KIND == "segfault":
        ctypes.string_at(0)
    elif KIND.startswith("exit-"):
        os._exit(int(KIND[5:]))
    elif KIND == "vanish":
        ctypes.CDLL(None)._exit(0)
    elif KIND == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif KIND == "hang":
        time.sleep(1000)


def with_fault(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, and before it the fault, if it is time."""

    def call(*args: Any, **kwargs: Any) -> Any:
        if IS_LAST and step == 3:
            fault()
        return function(*args, **kwargs)

    return call


torch.manual_seed(0)
model = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(3)))
optimizer = torch.optim.AdamW(model.parameters())
# Ranks of one node that share memory have nothing to gather.
topology = zerompi.Topology(MPI.COMM_WORLD, ranks_per_node=2) if PHASE == "gather" else None
zero = zerompi.partition(
    model, optimizer, units=lambda m: isinstance(m, torch.nn.Linear), topology=topology
)
step = 1
if PHASE == "forward":
    model[1].register_forward_pre_hook(with_fault(lambda *args: None))
elif PHASE == "gather":
    gather.Gather._fill = with_fault(gather.Gather._fill)
elif PHASE == "backward":
    model[1].register_full_backward_pre_hook(with_fault(lambda *args: None))
elif PHASE == "optimizer":
    optimizer.register_step_pre_hook(with_fault(lambda *args: None))
elif PHASE == "save":
    writer._write_slices = with_fault(writer._write_slices)
for step in range(1, 1000):
    model(torch.randn(4, 64)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    if step in (2, 3):
        zero.save(f"{DIRECTORY}/step-{step}", extra={"step": step})
        if not IS_LAST:
            print(f"step {step}", flush=True)
