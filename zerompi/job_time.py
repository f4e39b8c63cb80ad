"""When the time of this job is over, as far as its batch system tells.

Slurm tells every process. PBS, LSF and Flux tell who asks: the first rank of the job does, once, by the command
that users have for it.
"""

from __future__ import annotations

import logging
import math
import os
import re
import subprocess
import time
from collections.abc import Callable
from typing import NamedTuple

# When the job's time is over, in seconds since 1970. The first is for users and batch scripts.
_END_VARIABLES = ("ZEROMPI_END_TIME", "SLURM_JOB_END_TIME")
_PATIENCE = 15  # seconds that a command may take

_log = logging.getLogger("zerompi")


def seconds_to_end(*, asks: bool) -> float:
    """How long this job may still run, as far as its environment tells; else infinite.

    A time that has passed already is none: the process would not be there.

    Args:
        asks: whether to ask the batch system where the environment does not tell. One rank does.
    """
    for name in _END_VARIABLES:
        try:
            left = float(os.environ.get(name, "")) - time.time()
        except ValueError:
            continue
        if 0 < left < math.inf:
            return left
    for system in _SYSTEMS:
        job = os.environ.get(system.variable)
        if job and asks:
            return _ask(system, job)
    return math.inf


class _System(NamedTuple):
    """A batch system that tells who asks.

    Attributes:
        name: for people.
        variable: has the job's number, in a job of this system.
        command: which tells of a job.
        read: the seconds left, from what it prints; infinite if there is no limit.
    """

    name: str
    variable: str
    command: Callable[[str], list[str]]
    read: Callable[[str], float]


def _ask(system: _System, job: str) -> float:
    command = system.command(job)
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_PATIENCE,
            check=True,
            env={**os.environ, "LC_ALL": "C"},
        )
        left = system.read(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        text = " ".join(str(error).split())
        _log.warning(
            "the end of this job's time is not known, %s does not tell (%s): give a time limit, or "
            "ZEROMPI_END_TIME",
            system.name,
            text,
        )
        return math.inf
    return left if left > 0 else math.inf


def _read_qstat(text: str) -> float:
    """Of OpenPBS, PBS Pro and Torque: lines `name = value`."""
    fields = dict(re.findall(r"^\s*([\w.]+) = (.*?)\s*$", text, re.MULTILINE))
    if "Walltime.Remaining" in fields:
        return float(fields["Walltime.Remaining"])
    if "Resource_List.walltime" not in fields:
        return math.inf
    limit = _seconds(fields["Resource_List.walltime"])
    started = fields.get("stime") or fields.get("start_time")
    if started is not None:
        return time.mktime(time.strptime(started, "%a %b %d %H:%M:%S %Y")) + limit - time.time()
    return limit - _seconds(fields.get("resources_used.walltime", "0"))


def _seconds(text: str) -> float:
    """Of `hours:minutes:seconds`, or of seconds alone."""
    total = 0.0
    for part in text.split(":"):
        total = 60 * total + float(part)
    return total


def _read_bjobs(text: str) -> float:
    """Of LSF: `hours:minutes L` where there is a limit, E or X where there is an estimate only."""
    found = re.search(r"\b(\d+):(\d+) L\b", text)
    return math.inf if found is None else 60.0 * (60 * int(found[1]) + int(found[2]))


def _lsf_job(job: str) -> str:
    index = os.environ.get("LSB_JOBINDEX", "0")
    return job if index in ("", "0") else f"{job}[{index}]"


_SYSTEMS = (
    _System("PBS", "PBS_JOBID", lambda job: ["qstat", "-f", job], _read_qstat),
    _System("LSF", "LSB_JOBID", lambda job: ["bjobs", "-WL", _lsf_job(job)], _read_bjobs),
    _System("Flux", "FLUX_JOB_ID", lambda job: ["flux", "job", "timeleft"], float),
)
