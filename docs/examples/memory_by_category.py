"""Measure what each stage needs, by category, beside the formula of the ZeRO paper.

    mpiexec -n 4 python memory_by_category.py

Trains 50 million parameters in bfloat16 with Adam for two steps at each stage. "process" is what
the operating system says the ranks together have grown by, shared pages counted once (PSS). Every
rank is taken for a node of its own, as in the paper: on one node the ranks would share one copy of the
parameters at stages 1 and 2.
"""

from __future__ import annotations

import ctypes
import gc
import json

import torch
from mpi4py import MPI
from torch import nn

import zerompi
from zerompi.collectives import Group, all_reduce

WIDTH, BLOCKS = 1024, 6
CATEGORIES = ("parameters", "gradients", "optimizer_states")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(x)))


def resident_nbytes() -> int:
    """Proportional set size of this process: shared pages count once over all processes."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/smaps_rollup") as lines:
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))


def measure(stage: int, comm: MPI.Intracomm) -> dict[str, float]:
    """Bytes over all ranks: ledger and formula by category, and growth of the processes."""
    with torch.device("meta"):
        model = nn.Sequential(*[Block() for _ in range(BLOCKS)])
    before = resident_nbytes()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    precision = zerompi.MixedPrecision(torch.bfloat16, reduce_dtype=torch.bfloat16)
    with zerompi.partition(
        model,
        optimizer,
        stage=stage,
        comm=comm,
        mixed_precision=precision,
        topology=zerompi.Topology(comm, ranks_per_node=1),
    ) as zero:
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.randn(2, WIDTH)).float().square().mean().backward()
            optimizer.step()
        comm.Barrier()
        process = resident_nbytes() - before
        comm.Barrier()
        memory = zero.report().memory
    result = {"process": comm.allreduce(process)}
    for category in CATEGORIES:
        result[category] = comm.allreduce(memory.peak[category])
        result[f"{category} by formula"] = comm.allreduce(memory.formula[category])
    return result


def main() -> None:
    comm = MPI.COMM_WORLD
    # A first step and sum outside the measurement load what torch, and Numba, load when it is needed.
    group = Group(comm)
    all_reduce(torch.ones(8).bfloat16(), torch.empty(8).bfloat16(), group)
    group.close()
    warm_up = nn.Linear(8, 8).bfloat16()
    warm_up(torch.randn(2, 8).bfloat16()).sum().backward()
    torch.optim.Adam(warm_up.parameters()).step()
    for stage in range(4):
        result = measure(stage, comm)
        if comm.rank == 0:
            print(json.dumps({"stage": stage, **result}))


if __name__ == "__main__":
    main()
