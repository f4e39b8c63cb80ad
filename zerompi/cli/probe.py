"""Whether MPI can send memory of devices, tried in a job of its own: a crash is an answer, too.

`python -m zerompi.cli.probe` is a rank of that job.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

_SECONDS = 60
_NUMELS = (16, 1 << 22)  # what is sent at once, and what is fetched
# What launchers and MPI libraries tell their processes: the job is not part of this one.
_PREFIXES = ("PMI", "OMPI_", "PRTE_", "PMIX_", "HYDRA_", "HYDI_", "MPI_LOCAL", "PALS_", "MV2_COMM_")
# But these are what the user tells Open MPI.
_KEPT = ("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_MCA_", "PRTE_MCA_rmaps_")


def probe(launcher: str | None) -> str:
    """Start the job; return what came of it, in words.

    Args:
        launcher: command that starts two ranks; None is `mpiexec -n 2`.
    """
    command = shlex.split(launcher) if launcher else [_mpiexec(), "-n", "2"]
    environment = {
        key: value
        for key, value in os.environ.items()
        if key.startswith(_KEPT) or not key.startswith(_PREFIXES)
    }
    try:
        job = subprocess.Popen(
            [*command, sys.executable, "-m", "zerompi.cli.probe"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=environment,
            start_new_session=True,
        )
    except OSError as error:
        return f"not tried: {command[0]} did not start ({error.strerror}); give --launcher"
    try:
        output, _ = job.communicate(timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(job.pid, signal.SIGKILL)
        job.communicate()
        return f"no: the job hung for {_SECONDS} s"
    lines = [line for line in output.splitlines() if line.startswith("probe: ")]
    answer = lines[0].removeprefix("probe: ") if lines else ""
    if job.returncode == 0 and answer:
        return answer
    return f"no: the job ended with status {job.returncode}" + (f" ({answer})" if answer else "")


def _mpiexec() -> str:
    beside = Path(sys.executable).with_name("mpiexec")
    return str(beside) if beside.exists() else shutil.which("mpiexec") or "mpiexec"


def _rank() -> None:
    import torch
    from mpi4py import MPI

    from zerompi import device
    from zerompi.local_device import use_device
    from zerompi.memory import HOST, Space

    os.environ["ZEROMPI_SHARE_DEVICES"] = "1"
    comm = MPI.COMM_WORLD
    counts = comm.allgather(device.count())
    if comm.size != 2 or not all(counts):
        if comm.rank == 0:
            print(f"probe: not tried: {comm.size} ranks see {counts} devices", flush=True)
        return
    use_device(comm)
    space = Space(HOST.device, is_device=True)
    peer = 1 - comm.rank
    for numel in _NUMELS:
        sent, received = (device.allocate(numel, torch.int32, space) for _ in range(2))
        device.as_cupy(sent).fill(comm.rank + 1)
        device.as_cupy(received).fill(0)
        device.synchronise()
        memory = [MPI.buffer.fromaddress(t.data_ptr(), t.nbytes) for t in (sent, received)]
        comm.Sendrecv([memory[0], MPI.BYTE], peer, 0, [memory[1], MPI.BYTE], peer, 0)
        if not bool((device.as_cupy(received) == peer + 1).all()):
            print(f"probe: {numel} elements arrived wrong", flush=True)
            comm.Abort(1)
    if comm.rank == 0:
        print("probe: yes: messages between devices arrived", flush=True)


if __name__ == "__main__":
    _rank()
