"""Jobs under mpiexec, started by tests that run in one process."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from mpi4py import MPI

from harness import warm

ROOT = Path(__file__).parents[2]
_LAUNCHER_PREFIXES = (
    "HYDI_",
    "PMI_",
    "PMIX_",
    "OMPI_",
    "PRTE_",
    "HYDRA_",
    "MPI_LOCAL",
    "SLURM_",
    "MPIR_CVAR_CH",
)


class MPIRun(NamedTuple):
    """How a job ended."""

    returncode: int
    stdout: str
    stderr: str
    seconds: float

    @property
    def output(self) -> str:
        """Everything that the job wrote."""
        return self.stdout + self.stderr

    @classmethod
    def run(
        cls,
        ranks: int,
        arguments: Sequence[str | Path],
        *,
        timeout: float = 120,
        env: Mapping[str, str] | None = None,
        cwd: Path = ROOT,
    ) -> MPIRun:
        """Run `python ARGUMENTS` on `ranks` ranks and wait; a job that exceeds `timeout` is killed.

        The ranks are forks of a process that has imported torch (harness/warm.py).

        Raises:
            TimeoutError: with all that the job had written.
        """
        program = warm.program(list(map(str, arguments)), {**clean_environment(), **(env or {})})
        command = [*launcher(ranks), *program]
        return cls.run_command(command, timeout=timeout, env=env, cwd=cwd)

    @classmethod
    def run_command(
        cls,
        command: Sequence[str | Path],
        *,
        timeout: float = 120,
        env: Mapping[str, str] | None = None,
        cwd: Path = ROOT,
    ) -> MPIRun:
        """Run any command in a clean environment and wait; see `run`."""
        start = time.monotonic()
        process = subprocess.Popen(
            list(map(str, command)),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            text=True,
            errors="replace",
            cwd=cwd,
            env={**clean_environment(), **(env or {})},
            start_new_session=True,
        )
        try:
            stdout, stderr = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            _kill_session(process.pid)
            stdout, stderr = process.communicate()
            raise TimeoutError(
                f"{' '.join(map(str, command))} ran longer than {timeout} s\n{stdout}\n{stderr}"
            ) from None
        return cls(process.returncode, stdout, stderr, time.monotonic() - start)


def _kill_session(leader: int) -> None:
    """Kill all processes of a session: launchers give their ranks process groups of their own."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[3]) == leader:
                os.kill(int(stat.parent.name), signal.SIGKILL)


def launcher(ranks: int) -> list[str]:
    """The mpiexec of the MPI library that mpi4py uses here, with what it needs for `ranks` ranks."""
    beside = Path(sys.executable).parent / "mpiexec"
    mpiexec = str(beside) if beside.exists() else shutil.which("mpiexec")
    if mpiexec is None:
        raise FileNotFoundError("mpiexec: expected on PATH or beside python, got neither")
    options = ["--oversubscribe"] if MPI.get_vendor()[0] == "Open MPI" else []
    return [mpiexec, *options, "-n", str(ranks)]


def clean_environment() -> dict[str, str]:
    """The environment of this process without what MPI or its launcher put there."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(_LAUNCHER_PREFIXES)}
    env["OMP_NUM_THREADS"] = "1"
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), env.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    if os.geteuid() == 0:
        env["OMPI_ALLOW_RUN_AS_ROOT"] = env["OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"] = "1"
    env["PRTE_MCA_rmaps_default_mapping_policy"] = ":oversubscribe"
    return env
