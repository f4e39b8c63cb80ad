"""Count what each stage sends, beside the theory of the ZeRO paper.

    mpiexec -n 4 python traffic_by_stage.py

Elements, the mean over ranks, in units of Psi (N - 1) / N: Psi parameters, N ranks. First as if every
rank were a node; then on one node, whose ranks have one copy of the parameters together.
"""

from __future__ import annotations

import torch
from mpi4py import MPI
from torch import nn

import zerompi

LABELS = ("all_reduce", "reduce_scatter", "refresh", "all_gather")


def count(stage: int, comm: MPI.Intracomm, ranks_per_node: int) -> dict[str, float]:
    """Elements that a rank sends in one step, by label; the mean over ranks."""
    model = nn.Sequential(*[nn.Linear(61, 61) for _ in range(3)])
    optimizer = torch.optim.Adam(model.parameters())
    topology = zerompi.Topology(comm, ranks_per_node)
    with zerompi.partition(model, optimizer, stage=stage, comm=comm, topology=topology) as zero:
        for _ in range(2):
            model(torch.randn(4, 61)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        traffic = zero.report().traffic
    own = {label: sum(traffic.get(label, {}).values()) / 4 for label in LABELS}  # float32
    return {label: comm.allreduce(numel) / comm.size for label, numel in own.items()}


def main() -> None:
    comm = MPI.COMM_WORLD
    psi = 3 * (61 * 61 + 61)
    unit = psi * (comm.size - 1) / comm.size
    for ranks_per_node in (1, comm.size):
        if comm.rank == 0:
            print(f"{comm.size // ranks_per_node} nodes" if ranks_per_node == 1 else "1 node")
        for stage in range(4):
            sent = count(stage, comm, ranks_per_node)
            if comm.rank == 0:
                parts = " + ".join(
                    f"{label} {sent[label] / unit:.3f}" for label in LABELS if sent[label]
                )
                print(f"stage {stage}: {sum(sent.values()) / unit:.3f} = {parts}", flush=True)


if __name__ == "__main__":
    main()
