"""Measure what zerompi costs per unit and per step, as work grows.

    mpiexec -n 4 python overhead.py [--stage 3] [--units 10,100,1000] [--millions 1,25] [--merge]

A chain of square layers, each a unit (or, with --merge, those that zerompi chooses), is trained with plain SGD: once by zerompi, once by the same compute
without any communication (each rank steps its part of a model of its own). The difference, by the number of
units, is what a unit costs: hooks, queue, agreement, reduction, refresh. With one rank nothing is
communicated, and what is left is Python's part.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable
from statistics import median

import torch
from mpi4py import MPI
from torch import nn

import zerompi


def make_model(units: int, numel: int) -> nn.Sequential:
    width = max(4, round((numel / units) ** 0.5))
    return nn.Sequential(*[nn.Linear(width, width, bias=False) for _ in range(units)])


def seconds_per_step(step: Callable[[], None], comm: MPI.Intracomm, repeats: int) -> float:
    """The median over repetitions of the slowest rank's time."""
    times = []
    for number in range(2 + repeats):
        comm.Barrier()
        start = time.perf_counter()
        step()
        elapsed = comm.allreduce(time.perf_counter() - start, MPI.MAX)
        if number >= 2:
            times.append(elapsed)
    return median(times)


def without_communication(units: int, numel: int, comm: MPI.Intracomm, repeats: int) -> float:
    model = make_model(units, numel)
    x = torch.randn(2, model[0].in_features)
    pieces = [
        (p, nn.Parameter(torch.empty(len(p.data.view(-1)[comm.rank :: comm.size]))))
        for p in model.parameters()
    ]
    optimizer = torch.optim.SGD([piece for _, piece in pieces], lr=1e-9)

    def step() -> None:
        model(x).square().mean().backward()
        for parameter, piece in pieces:
            piece.grad = parameter.grad.view(-1)[: piece.numel()]
        optimizer.step()
        optimizer.zero_grad()
        model.zero_grad()

    return seconds_per_step(step, comm, repeats)


def with_zerompi(
    units: int, numel: int, comm: MPI.Intracomm, repeats: int, stage: int, *, merge: bool
) -> float:
    model = make_model(units, numel)
    x = torch.randn(2, model[0].in_features)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-9)
    chosen = None if merge else list(model)
    with zerompi.partition(model, optimizer, stage=stage, comm=comm, units=chosen):

        def step() -> None:
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

        return seconds_per_step(step, comm, repeats)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--merge", action="store_true", help="small layers share a unit")
    parser.add_argument("--stage", type=int, default=3)
    parser.add_argument("--units", default="10,100,1000")
    parser.add_argument("--millions", default="1,25")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    comm = MPI.COMM_WORLD
    torch.set_num_threads(1)
    for millions in map(float, arguments.millions.split(",")):
        for units in map(int, arguments.units.split(",")):
            numel = int(millions * 1e6)
            free = without_communication(units, numel, comm, arguments.repeats)
            gc.collect()
            ours = with_zerompi(
                units, numel, comm, arguments.repeats, arguments.stage, merge=arguments.merge
            )
            gc.collect()
            if comm.rank == 0:
                print(
                    f"{comm.size} ranks, {units} layers, {millions:g} M parameters: "
                    f"{1e3 * free:.2f} ms without, {1e3 * ours:.2f} ms with zerompi; "
                    f"{1e6 * (ours - free) / units:.0f} us per layer and step",
                    flush=True,
                )


if __name__ == "__main__":
    main()
