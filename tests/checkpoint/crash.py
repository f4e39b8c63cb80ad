"""Kills a random rank of a job that trains and saves, at random moments, and looks at what is left.

    python tests/checkpoint/crash.py --count 200 --seconds 1200

Each round starts a job that continues from the latest checkpoint, saves after every step, in the
foreground and in the background by turns, and dies. Afterwards the latest checkpoint must be whole:
of the last step that the job knew to be saved or a later one, every byte as its checksum says. The
next round's job loads it. Half of the kills wait for a save to begin.
"""

from __future__ import annotations

import argparse
import mmap
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

IDLE, BLOCKING, BACKGROUND, LOADING = range(4)
NAMES = ("training", "in save", "in a background save", "loading")
_FIELDS = 3  # pid, phase, last step known to be saved


class Killed(NamedTuple):
    """One round."""

    phase: int
    step: int
    seconds: float


# -- the job that dies -------------------------------------------------------------------------


def board(path: Path, ranks: int) -> np.ndarray:
    """What the ranks tell of themselves, (ranks, fields), shared through a file."""
    with path.open("r+b") as stream:
        return np.frombuffer(mmap.mmap(stream.fileno(), 0), dtype=np.int64).reshape(ranks, _FIELDS)


def train(directory: Path, width: int) -> None:
    """Train and save until somebody kills this."""
    import zerompi  # before MPI: it prepares the environment

    from mpi4py import MPI  # isort: skip

    comm = MPI.COMM_WORLD
    own = board(directory / "board", comm.size)[comm.rank]
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(width, width), torch.nn.Tanh(), torch.nn.Linear(width, 1)
    )
    optimizer = torch.optim.AdamW(model.parameters())
    zero = zerompi.partition(model, optimizer)
    checkpoints = directory / "checkpoints"
    if comm.rank == 0:
        zerompi.checkpoint.remove_leftovers(checkpoints)
    latest = comm.bcast(zerompi.checkpoint.find_latest(checkpoints))
    own[:2] = os.getpid(), LOADING
    step = 0 if latest is None else int(zero.load(latest)["step"])
    own[1:3] = IDLE, step
    while True:
        step += 1
        for _ in range(4):
            model(torch.randn(4, width)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        blocking = step % 2 == 0
        own[1] = BLOCKING
        zero.save(checkpoints / f"step-{step}", extra={"step": step}, blocking=blocking, keep=2)
        own[1:3] = (IDLE, step) if blocking else (BACKGROUND, step - 1)


# -- the one that kills ------------------------------------------------------------------------


def verified_step(checkpoints: Path) -> int:
    """Read all of the latest checkpoint; its step, 0 if there is none."""
    from zerompi.checkpoint import CheckpointReader, find_latest

    latest = find_latest(checkpoints)
    if latest is None:
        return 0
    with CheckpointReader(latest) as reader:
        for specs, read in (
            (reader.model_specs, reader.read_model),
            (reader.optimizer_specs, reader.read_optimizer),
        ):
            for name, spec in specs.items():
                read(name, 0, spec.numel, torch.empty(spec.numel, dtype=spec.dtype))
        step = reader.state["extra"]["step"]
    if latest.name != f"step-{step}":
        raise AssertionError(f"{latest} holds step {step}")
    return int(step)


def kill_once(directory: Path, ranks: int, width: int, chance: random.Random) -> Killed:
    """Start the job, kill a rank, wait for the others, look at the latest checkpoint."""
    from harness import warm
    from harness.mpirun import ROOT, clean_environment, launcher

    (directory / "board").write_bytes(bytes(8 * _FIELDS * ranks))
    told = board(directory / "board", ranks)
    arguments = [__file__, "--job", str(directory), "--width", str(width)]
    command = [*launcher(ranks), *warm.program(arguments, clean_environment())]
    with open(directory / "output", "wb") as output:
        job = subprocess.Popen(
            command,
            stdout=output,
            stderr=output,
            stdin=subprocess.DEVNULL,
            cwd=ROOT,
            env=clean_environment(),
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + 120
        while not told[:, 0].all() and job.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        victim = chance.randrange(ranks)
        time.sleep(chance.uniform(0, 0.4))
        if chance.random() < 0.5:
            wanted = chance.choice((BLOCKING, BACKGROUND))
            while told[victim, 1] != wanted and job.poll() is None and time.monotonic() < deadline:
                time.sleep(0.0005)
            time.sleep(chance.uniform(0, 0.01))
        if job.poll() is not None or not told[:, 0].all():
            raise AssertionError(f"ended by itself: {(directory / 'output').read_text()}")
        os.kill(int(told[victim, 0]), signal.SIGKILL)
        start = time.monotonic()
        job.wait(timeout=10)  # nobody waits longer
        seconds = time.monotonic() - start
        while any(_is_alive(int(pid)) for pid in told[:, 0]):
            if time.monotonic() - start > 10:
                raise AssertionError("a rank has outlived the job by 10 s")
            time.sleep(0.01)
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
    phase, known = int(told[victim, 1]), int(told[:, 2].max())
    step = verified_step(directory / "checkpoints")
    if step < known:
        raise AssertionError(f"{known} was saved, the latest is {step}")
    return Killed(phase, step, seconds)


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def crash(count: int, ranks: int, width: int, seed: int, seconds: float = 1e9) -> list[Killed]:
    """Kill `count` jobs, or fewer if `seconds` are over; each continues from what the last has left.

    Raises:
        AssertionError: something was lost, or somebody waited.
    """
    chance = random.Random(seed)
    directory = Path(tempfile.mkdtemp(prefix="zerompi-crash-"))
    rounds: list[Killed] = []
    deadline = time.monotonic() + seconds
    try:
        while len(rounds) < count and time.monotonic() < deadline:
            rounds.append(kill_once(directory, ranks, width, chance))
    finally:
        shutil.rmtree(directory)
    return rounds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=4)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--job", type=Path)
    options = parser.parse_args()
    if options.job is not None:
        train(options.job, options.width)
        return
    rounds = crash(options.count, options.ranks, options.width, options.seed, options.seconds)
    print(f"{len(rounds)} jobs killed; the latest checkpoint was whole each time")
    for phase, number in sorted(Counter(killed.phase for killed in rounds).items()):
        print(f"  {number:4d} {NAMES[phase]}")
    print(f"the other ranks ended within {max(killed.seconds for killed in rounds):.2f} s")


if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
    main()
