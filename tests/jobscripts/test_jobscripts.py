"""The batch scripts are clean, and the main job runs, stops, dies and goes on through them on several nodes."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from mpi4py import MPI

from harness.mpirun import ROOT, MPIRun, clean_environment
from zerompi.checkpoint import CheckpointReader, find_latest

SCRIPTS = ROOT / "jobscripts"
SLURM = ROOT.parent / "shared" / "slurm"
ALL_SCRIPTS = sorted(path.name for path in SCRIPTS.glob("*.sh"))
SLURM_SCRIPTS = [name for name in ALL_SCRIPTS if name.startswith("slurm-")]
IS_OPEN_MPI = MPI.get_vendor()[0] == "Open MPI"
TINY = ["--layers", "1", "--width", "32", "--heads", "2", "--context", "32", "--batch", "4"]
TINY += ["--eval-batches", "1", "--sample", "0", "--progress", "lines"]
KILL_WAIT = 30  # seconds between SIGTERM and SIGKILL, as where Slurm is left as it comes
STEPS = 150  # of runs that are interrupted: seconds

pytestmark = pytest.mark.skipif(MPI.COMM_WORLD.size > 1, reason="starts jobs of its own")


def settings(out, steps):
    """What a user would set for a short run of this checkout."""
    return {
        **clean_environment(),
        "OUT": str(out),
        "STEPS": str(steps),
        "SAVE_EVERY": "0",
        "CPU_BIND": "none",
        "ZEROMPI": f"{sys.executable} -m zerompi",
        "MPIEXEC": shutil.which("mpiexec", path=Path(sys.executable).parent) or "mpiexec",
        # All nodes are this machine, which srun does not tell Open MPI: its ranks share cores.
        "OMPI_MCA_mpi_yield_when_idle": "1",
    }


def remove_shared_memory():
    """Remove what killed ranks of MPICH have left, which is named by the job's number.

    The numbers of each Slurm of a test's own begin with 1, and MPI_Init fails where there is a file already.
    """
    maps = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            maps.append((process / "maps").read_text())
    for path in Path("/dev/shm").glob("mpich_shm_*"):
        with suppress(OSError):
            is_old = time.time() - path.stat().st_mtime > 60
            if is_old and not any(path.name in text for text in maps):
                path.unlink()


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """A real Slurm of two nodes on this machine; the environment in which its commands find it."""
    missing = [name for name in ("sbatch", "slurmctld", "munged") if not shutil.which(name)]
    if missing:
        pytest.skip(f"Slurm is not installed: no {', '.join(missing)}")
    if not SLURM.is_dir():
        pytest.skip(f"no {SLURM}: nothing there to start Slurm on one machine")
    remove_shared_memory()
    directory = tmp_path_factory.mktemp("slurm")
    place = {"SLURM_DIR": str(directory / "s"), "PORT0": str(17600 + os.getpid() % 1000 * 3)}
    environment = {**os.environ, **place, "NODES": "2", "CPUS": "4", "KILLWAIT": str(KILL_WAIT)}
    up = subprocess.run(
        [SLURM / "slurm_up.sh"], env=environment, capture_output=True, text=True, timeout=60
    )
    if up.returncode:
        pytest.skip(f"Slurm does not start here: {up.stderr[-500:]}")
    yield {**place, "SLURM_CONF": f"{place['SLURM_DIR']}/slurm.conf"}
    subprocess.run([SLURM / "slurm_down.sh"], env=environment, capture_output=True, timeout=60)


@pytest.fixture(scope="module")
def mpi_plugin(slurm):
    """The plugin of srun that fits the MPI library."""
    name = "pmix" if IS_OPEN_MPI else "pmi2"
    probe = ["srun", "--nodes=1", f"--mpi={name}", "true"]
    done = subprocess.run(probe, env={**os.environ, **slurm}, capture_output=True, timeout=60)
    if done.returncode:
        pytest.skip(f"this Slurm cannot load its plugin {name}")
    return name


def submit(slurm, script, log, environment, *arguments):
    """Submit a batch script on 2 nodes x 2 ranks; return the job's number."""
    command = [
        "sbatch", "--parsable", "--nodes=2", "--ntasks-per-node=2", f"--output={log}",
        f"--chdir={ROOT}", SCRIPTS / script, *arguments,
    ]  # fmt: skip
    done = subprocess.run(
        command, env={**environment, **slurm}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def wait_for(condition, what, log, seconds=300):
    end = time.monotonic() + seconds
    while not condition():
        text = log.read_text(errors="replace") if log.exists() else "nothing"
        assert time.monotonic() < end, f"no {what} after {seconds} s; the job wrote\n{text}"
        time.sleep(0.3)


def job_field(slurm, job, name):
    done = subprocess.run(
        ["scontrol", "show", "job", job],
        env={**os.environ, **slurm},
        capture_output=True,
        text=True,
    )
    found = re.search(rf"\b{name}=(\S+)", done.stdout)
    return found[1] if found else ""


def train_with(slurm, script, tmp_path, extra):
    log = tmp_path / "job.log"
    environment = {**settings(tmp_path / "out", 3), **extra}
    job = submit(slurm, script, log, environment, *TINY)
    wait_for(
        lambda: job_field(slurm, job, "JobState") in ("COMPLETED", "FAILED", "CANCELLED"),
        "end",
        log,
    )
    text = log.read_text(errors="replace")
    assert job_field(slurm, job, "JobState") == "COMPLETED", text
    assert "2 nodes, 2 ranks each" in text
    return json.loads((tmp_path / "out" / "summary.json").read_text())


def assert_ran_on_two_nodes(summary):
    assert (summary["run"]["ranks"], summary["run"]["steps"]) == (4, 3)
    if not IS_OPEN_MPI:  # which sees through nodes that are one machine
        assert summary["run"]["nodes"] == 2


def part(script, first, last):
    """The text of a script from `first` to the end of the line with `last`, each found once."""
    text = (SCRIPTS / script).read_text()
    assert text.count(first) == 1, f"{script}: {first}"
    start = text.index(first)
    end = text.index("\n", text.index(last, start))
    return text[start:end]


@pytest.mark.parametrize(
    ("first", "last", "scripts"),
    [
        ("# Arguments after the script's name", "# -- settings", SLURM_SCRIPTS),
        ("# -- environment", "export OMP_NUM_THREADS", SLURM_SCRIPTS),
        ("# -- run", "threads each: zerompi train", SLURM_SCRIPTS),
        ("training=$!", 'exit "$status"', SLURM_SCRIPTS),
        ("for module in", "bin/activate", ALL_SCRIPTS),
        ("# wait returns at a signal", "done", ALL_SCRIPTS),
    ],
)
def test_what_scripts_share_is_the_same_in_each(first, last, scripts):
    """Each script is whole by itself, since users copy one of them and change it."""
    texts = {part(script, first, last) for script in scripts}
    assert len(texts) == 1, "\n====\n".join(texts)


def test_a_setting_has_the_same_default_and_comment_in_each_script():
    lines = {}
    for script in ALL_SCRIPTS:
        found = re.findall(r"^([A-Z_]+)=\$\{\1:-.*", (SCRIPTS / script).read_text(), re.MULTILINE)
        assert {"OUT", "STEPS", "SAVE_EVERY", "CPU_BIND"} <= set(found)
        for name in found:
            lines.setdefault(name, set()).add(part(script, f"\n{name}=", f"{name}="))
    differing = {name for name, texts in lines.items() if len(texts) > 1}
    assert differing == {"CPU_BIND"}  # srun says cores, mpiexec core


@pytest.mark.parametrize("script", ALL_SCRIPTS)
def test_script_is_clean(script):
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is not installed")
    done = subprocess.run(
        ["shellcheck", SCRIPTS / script], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout


def test_main_job_runs_under_srun(slurm, mpi_plugin, tmp_path):
    summary = train_with(slurm, "slurm-srun.sh", tmp_path, {"MPI_PLUGIN": mpi_plugin})
    assert_ran_on_two_nodes(summary)


def test_main_job_runs_under_mpiexec_in_a_slurm_job(slurm, tmp_path):
    options = "" if IS_OPEN_MPI else "-iface lo"
    summary = train_with(slurm, "slurm-mpirun.sh", tmp_path, {"MPIEXEC_OPTIONS": options})
    assert_ran_on_two_nodes(summary)


def test_srun_with_a_plugin_that_does_not_fit_is_refused(slurm, tmp_path):
    log = tmp_path / "job.log"
    environment = {**settings(tmp_path / "out", 3), "MPI_PLUGIN": "none"}
    job = submit(slurm, "slurm-srun.sh", log, environment, *TINY)
    wait_for(lambda: job_field(slurm, job, "JobState") == "FAILED", "failure", log)
    assert "srun started 4 processes" in log.read_text(errors="replace")


class Course:
    """A run of STEPS steps in a batch job that something befalls."""

    def __init__(self, slurm, mpi_plugin, directory):
        self.slurm, self.mpi_plugin = slurm, mpi_plugin
        self.log, self.out = directory / "job.log", directory / "out"

    def submit(self):
        extra = {"MPI_PLUGIN": self.mpi_plugin, "SAVE_EVERY": "20"}
        environment = {**settings(self.out, STEPS), **extra}
        options = [*TINY, "--eval-every", "0"]
        self.job = submit(self.slurm, "slurm-srun.sh", self.log, environment, *options)

    def run(self, program, *arguments):
        command = [program, *arguments, self.job]
        subprocess.run(command, env={**os.environ, **self.slurm}, check=True, timeout=60)

    def field(self, name):
        return job_field(self.slurm, self.job, name)

    @property
    def text(self):
        return self.log.read_text(errors="replace")

    @property
    def losses(self):
        """By step; each step once."""
        lines = (self.out / "metrics.jsonl").read_text().splitlines()
        entries = [entry for entry in map(json.loads, lines) if entry["kind"] == "train"]
        losses = {entry["step"]: entry["loss"] for entry in entries}
        assert len(losses) == len(entries)
        return losses

    @property
    def saved(self):
        """The step of the latest checkpoint, all of which is read."""
        with CheckpointReader(find_latest(self.out / "checkpoints")) as reader:
            for specs, read in (
                (reader.model_specs, reader.read_model),
                (reader.optimizer_specs, reader.read_optimizer),
            ):
                for name, spec in specs.items():
                    read(name, 0, spec.numel, torch.empty(spec.numel, dtype=spec.dtype))
            return reader.state["extra"]["step"]

    def processes(self):
        """Command line and environment by process of those that know the Slurm of this run."""
        mine = f"SLURM_CONF={self.slurm['SLURM_CONF']}".encode()
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                variables = (process / "environ").read_bytes().split(b"\0")
                if mine in variables:
                    yield int(process.name), (process / "cmdline").read_bytes(), variables

    def steps_alive(self):
        """Processes of slurmd that look after a step of the job."""
        for pid, command, _ in self.processes():
            if command.startswith(f"slurmstepd: [{self.job}.".encode()):
                yield pid

    def ranks_on(self, node):
        """Processes of `zerompi train` under the slurmd of a node."""
        for pid, command, variables in self.processes():
            is_rank = command.split(b"\0")[1:4] == [b"-m", b"zerompi", b"train"]
            if is_rank and f"SLURMD_NODENAME={node}".encode() in variables:
                yield pid

    def wait_for_step(self, step):
        self.wait_for_state("RUNNING", "FAILED")
        metrics = self.out / "metrics.jsonl"
        wait_for(
            lambda: metrics.exists() and f'"step": {step},' in metrics.read_text(), step, self.log
        )

    def wait_for_state(self, *states, seconds=300):
        wait_for(lambda: self.field("JobState") in states, states, self.log, seconds)
        return self.field("JobState")


@pytest.fixture
def course(slurm, mpi_plugin, tmp_path):
    return Course(slurm, mpi_plugin, tmp_path)


@pytest.fixture(scope="module")
def uninterrupted(slurm, mpi_plugin, tmp_path_factory):
    """The losses of the same run that nothing befalls."""
    whole = Course(slurm, mpi_plugin, tmp_path_factory.mktemp("whole"))
    whole.submit()
    assert whole.wait_for_state("COMPLETED", "FAILED", "CANCELLED") == "COMPLETED", whole.text
    assert sorted(whole.losses) == list(range(1, STEPS + 1))
    return whole.losses


def test_job_that_gets_usr1_saves_is_queued_again_and_goes_on_as_if_uninterrupted(
    course, uninterrupted
):
    """What --signal=B:USR1@120 sends two minutes before the end, at a time of the test's own."""
    course.submit()
    course.wait_for_step(30)
    course.run("scancel", "--batch", "--signal=USR1")
    course.wait_for_state("PENDING")
    assert course.field("Restarts") == "1"
    stopped = int(re.search(r"stopped by SIGUSR1 after step (\d+); saved", course.text)[1])
    assert 30 <= stopped == course.saved < STEPS
    # Slurm lets a job that is queued again wait for two minutes. At once would not do: a node still
    # ends the first steps, and refuses what starts in the second in which it was told to.
    wait_for(lambda: not list(course.steps_alive()), "end of the first steps", course.log)
    command = ["scontrol", "update", f"JobId={course.job}", "StartTime=now+3"]
    subprocess.run(command, env={**os.environ, **course.slurm}, check=True, timeout=60)
    assert course.wait_for_state("COMPLETED", "FAILED") == "COMPLETED", course.text
    assert f"continuing from {course.out}/checkpoints/step-{stopped} after" in course.text
    assert course.losses == uninterrupted


def test_job_that_is_cancelled_saves_and_is_not_queued_again(course):
    course.submit()
    course.wait_for_step(10)
    course.run("scancel")
    assert course.wait_for_state("CANCELLED", "COMPLETED", "FAILED") == "CANCELLED"
    # The ranks get SIGTERM from Slurm and SIGUSR1 from the script, which gets SIGTERM, too.
    said = r"stopped by SIG(?:TERM|USR1) after step (\d+); saved"
    wait_for(lambda: re.search(said, course.text), "stop", course.log)
    stopped = int(re.search(said, course.text)[1])
    assert 10 <= stopped == course.saved < STEPS
    assert course.field("Restarts") == "0"


def test_job_whose_ranks_of_a_node_are_killed_ends_and_goes_on_when_submitted_again(
    course, uninterrupted
):
    course.submit()
    course.wait_for_step(30)
    victims = list(course.ranks_on("n2"))
    assert len(victims) == 2
    for pid in victims:
        os.kill(pid, signal.SIGKILL)
    # The other ranks take srun's SIGTERM for a request to stop, which they cannot agree on any more.
    wait_for(
        lambda: not list(course.ranks_on("n1")), "end of the other ranks", course.log, seconds=10
    )
    ends = ("FAILED", "COMPLETED", "CANCELLED", "NODE_FAIL")
    assert course.wait_for_state(*ends, seconds=KILL_WAIT / 2) == "FAILED", course.text
    saved = course.saved
    assert saved >= 20
    course.submit()
    assert course.wait_for_state("COMPLETED", "FAILED") == "COMPLETED", course.text
    assert f"after step {saved}\n" in course.text
    assert course.losses == uninterrupted


def pbs_environment(tmp_path, steps, options=()):
    """PBS is played by its environment: two lines for this machine in the node file."""
    (tmp_path / "nodes").write_text("localhost\nlocalhost\n")
    return {
        **settings(tmp_path / "out", steps),
        "PBS_NODEFILE": str(tmp_path / "nodes"),
        "PBS_O_WORKDIR": str(ROOT),
        "PBS_JOBID": "7.server",
        "NCPUS": "2",
        "OPTIONS": " ".join([*TINY, *options]),
    }


def test_main_job_runs_in_a_pbs_job(tmp_path):
    environment = pbs_environment(tmp_path, 3)
    done = MPIRun.run_command(["bash", SCRIPTS / "pbs.sh"], env=environment, timeout=100)
    assert done.returncode == 0, done.output
    assert "1 nodes, 2 ranks each, 1 threads each" in done.output
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["run"]["ranks"] == 2


def test_pbs_job_whose_time_is_over_saves_and_is_submitted_again(tmp_path):
    """The end of the time is what a qstat of ours says, less the margin: it has come already."""
    qstat = tmp_path / "bin" / "qstat"
    qstat.parent.mkdir()
    qstat.write_text('#!/bin/sh\necho "    Resource_List.walltime = 00:01:00"\n')
    qstat.chmod(0o755)
    environment = {
        **pbs_environment(tmp_path, 2000, ["--margin", "60"]),
        "PATH": f"{qstat.parent}:{os.environ['PATH']}",
        "RESUBMIT": f"echo again > {tmp_path / 'queue'}",
    }
    done = MPIRun.run_command(["bash", SCRIPTS / "pbs.sh"], env=environment, timeout=100)
    assert done.returncode == 75, done.output
    assert (tmp_path / "queue").read_text() == "again\n"
    assert (tmp_path / "out" / "checkpoints" / "step-1" / "state.json").is_file()
