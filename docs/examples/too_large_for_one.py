"""A model that is too large for one rank trains on four, under a hard memory limit.

    mpiexec -n 4 python too_large_for_one.py --stage 0    # dies: out of memory
    mpiexec -n 4 python too_large_for_one.py --stage 3    # trains

Each rank may take 320 MB beyond what it has after its imports (RLIMIT_AS, set by itself). 25 million
parameters in float32 with Adam need 16 bytes each: 403 MB where every rank holds everything, 101
MB and the buffers of a unit where four ranks share it.
"""

from __future__ import annotations

import argparse
import resource

import torch
from mpi4py import MPI
from torch import nn

import zerompi

LIMIT_NBYTES = 320 << 20
WIDTH, BLOCKS = 512, 12


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(x)))


def load_kernels() -> None:
    """Let torch import what it imports at the first backward and the first optimizer step."""
    layer = nn.Linear(8, 8)
    layer(torch.randn(2, 8)).sum().backward()
    torch.optim.Adam(layer.parameters()).step()


def limit_memory(nbytes: int) -> None:
    """Let this process take `nbytes` more address space than it has now."""
    with open("/proc/self/status") as lines:
        now = next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmSize:"))
    resource.setrlimit(resource.RLIMIT_AS, (now + nbytes, now + nbytes))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--stage", type=int, default=3)
    stage = parser.parse_args().stage
    comm = MPI.COMM_WORLD
    torch.manual_seed(0)
    torch.set_num_threads(1)
    load_kernels()
    limit_memory(LIMIT_NBYTES)

    with torch.device("meta"):  # no rank ever holds the whole model
        model = nn.Sequential(*[Block() for _ in range(BLOCKS)])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    with zerompi.partition(model, optimizer, stage=stage, comm=comm) as zero:
        for step in range(5):
            torch.manual_seed(step * comm.size + comm.rank)
            x = torch.randn(8, WIDTH)
            loss = nn.functional.mse_loss(model(x), torch.zeros_like(x))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if comm.rank == 0:
                print(f"stage {stage}, step {step}: loss {loss.item():.4f}", flush=True)
        memory = zero.report().memory
    if comm.rank == 0:
        held = ", ".join(f"{key} {nbytes / 2**20:.0f} MB" for key, nbytes in memory.peak.items())
        print(f"trained within the limit; at peak: {held}")


if __name__ == "__main__":
    main()
