"""`zerompi info`: what this installation and this job consist of."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version

import typer
from mpi4py import MPI
from rich.table import Table

import zerompi
from zerompi import cuda_aware, device
from zerompi.cli.probe import probe as run_probe
from zerompi.collectives.summation import COMPILED, compiled_sum
from zerompi.kernels import summation_on_host
from zerompi.launch import launched_size, local_ranks, num_cores, threads_per_rank
from zerompi.train.config import InputError
from zerompi.train.devices import why_not
from zerompi.train.display import make_console

_PACKAGES = ("mpi4py", "torch", "numpy", "numba", "safetensors", "transformers")
_THREAD_LEVELS = {
    MPI.THREAD_SINGLE: "MPI_THREAD_SINGLE",
    MPI.THREAD_FUNNELED: "MPI_THREAD_FUNNELED",
    MPI.THREAD_SERIALIZED: "MPI_THREAD_SERIALIZED",
    MPI.THREAD_MULTIPLE: "MPI_THREAD_MULTIPLE",
}


def info(
    probe: bool = typer.Option(
        False,
        "--probe",
        help="Also try, in a job of its own that may crash, whether MPI can send memory of devices. "
        "Without mpiexec.",
    ),
    launcher: str | None = typer.Option(
        None, help="What starts the two ranks of that job. Default: mpiexec -n 2"
    ),
) -> Callable[[], None]:
    """Show the MPI library, the ranks and their nodes, versions, cores, memory and devices.

    With mpiexec it shows the job; without, a single process.
    """
    return partial(_show, probe_with=(launcher,) if probe else None)


def _show(probe_with: tuple[str | None] | None) -> None:
    world = MPI.COMM_WORLD
    if probe_with is not None and world.size > 1:
        raise InputError("--probe: expected a single process, which starts a job, got several")
    topology = zerompi.Topology(world)
    local_size = len(topology.ranks_of_node[topology.node_of[world.rank]])
    hosts = world.gather(platform.node(), root=0)
    threads = world.gather(threads_per_rank(local_size), root=0)
    if hosts is None or threads is None:
        return
    table = Table(show_header=False, title=f"zerompi {zerompi.__version__}")
    table.add_row("MPI library", MPI.Get_library_version().strip("\0\n ").splitlines()[0])
    table.add_row("MPI standard", ".".join(map(str, MPI.Get_version())))
    table.add_row("thread level", _THREAD_LEVELS.get(MPI.Query_thread(), "unknown"))
    table.add_row("launcher", _launcher())
    table.add_row("ranks", str(world.size))
    for node, ranks in enumerate(topology.ranks_of_node):
        names = ", ".join(sorted({hosts[rank] for rank in ranks}))
        table.add_row(f"node {node}", f"{names}: ranks {', '.join(map(str, ranks))}")
    table.add_row("cores of rank 0", f"{num_cores()} of {os.cpu_count()}")
    table.add_row("threads per rank", ", ".join(map(str, sorted(set(threads)))))
    table.add_row("16-bit sums", _narrow_sums())
    table.add_row("memory of node 0", _memory())
    table.add_row("devices of rank 0", _devices())
    aware = cuda_aware.detect()
    table.add_row("MPI reads devices", f"{'yes' if aware.is_aware else 'no'}: {aware.source}")
    table.add_row("zerompi train", f"on {_train_device()}")
    table.add_row("device transport", _transport(aware.is_aware))
    if probe_with is not None:
        table.add_row("probe", run_probe(*probe_with))
    table.add_row("Python", platform.python_version())
    for name in _PACKAGES:
        table.add_row(name, _version(name))
    make_console().print(table)


def _launcher() -> str:
    found = launched_size()
    if found is None:
        return "none (a single process)"
    size, name = found
    return f"{name}, {size} processes, {local_ranks()} on this node"


def _narrow_sums() -> str:
    """Whether sums of float16 and bfloat16 on the host are compiled; why not is logged."""
    if not summation_on_host.is_installed():
        return "not compiled: Numba is not installed"
    names = [str(dtype).removeprefix("torch.") for dtype in COMPILED if compiled_sum(dtype)]
    return f"compiled: {', '.join(names)}" if names else "not compiled: Numba fails"


def _devices() -> str:
    if not device.is_installed():
        return "none: CuPy is not installed"
    names = [device.name(number) for number in range(device.count())]
    return ", ".join(names) or "none that CuPy sees"


def _train_device() -> str:
    """What --device auto would be with this process's devices."""
    if why_not() is None:
        return f"cuda: each rank takes one of {device.count()} devices"
    return "the host: it has no CUDA device"


def _transport(is_aware: bool) -> str:
    forced = os.environ.get("ZEROMPI_DEVICE_TRANSPORT")
    if forced:
        return f"{forced}: ZEROMPI_DEVICE_TRANSPORT says so"
    if is_aware:
        return "cuda-aware"
    return "ipc inside nodes where it works, staged otherwise"


def _memory() -> str:
    page = os.sysconf("SC_PAGE_SIZE")
    total = os.sysconf("SC_PHYS_PAGES") * page
    available = os.sysconf("SC_AVPHYS_PAGES") * page
    return f"{total / 2**30:.1f} GiB, {available / 2**30:.1f} GiB free"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
