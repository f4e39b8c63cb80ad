"""`zerompi bench` measures every way of a collective, and refuses what it does not know."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console

import zerompi
from harness.mpirun import MPIRun
from zerompi.bench import checkpoints
from zerompi.bench.collectives import COLLECTIVES, measure
from zerompi.bench.tables import table_of_checkpoints, table_of_training
from zerompi.bench.training import (
    ON_NODES,
    SYSTEMS,
    Trained,
    Workload,
    available,
    locked_build,
    worthwhile,
)
from zerompi.bench.training import measure as measure_training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("collective", COLLECTIVES)
def test_every_way_is_measured(comm, collective, dtype):
    results = measure(comm, collective, 10_000, dtype, repeats=2)
    ways = [result.way for result in results]
    assert {"messages", "gloo", "copy"} <= set(ways)
    assert len(ways) == len(set(ways))
    has_mpi = dtype is torch.float32 or collective == "all_gather"
    assert ("MPI" in ways) == has_mpi
    for result in results:
        assert result.seconds > 0
        assert result.nbytes >= 10_000
        assert (result.ratio is not None) == has_mpi
    assert comm.allgather(results) == [results] * comm.size


def test_results_can_be_saved_and_compared(run_mpi: Callable[..., MPIRun], tmp_path: Path) -> None:
    words = ["-m", "zerompi", "bench", "--sizes", "1KiB", "--collectives", "all_gather"]
    saved = tmp_path / "site.json"
    job = run_mpi(2, [*words, "--repeats", "1", "--out", saved])
    assert job.returncode == 0, job.output
    content = json.loads(saved.read_text())
    assert content["ranks"] == 2
    assert {row["collective"] for row in content["results"]} == {"all_gather"}
    job = run_mpi(2, [*words, "--repeats", "1", "--compare", saved])
    assert job.returncode == 0, job.output
    assert "before" in job.stdout


@pytest.mark.parametrize("fused", [False, True])
def test_all_systems_train_alike(comm, fused):
    """Equal losses: what is timed is the same training."""
    workload = Workload(layers=2, width=32, heads=2, context=8, batch=2, steps=1, fused=fused)
    names = available(zerompi.Topology(comm))
    if fused:  # DeepSpeed works with a process's first process group only
        names = [name for name in names if not name.startswith("deepspeed")]
    results = {r.system: r for r in measure_training(comm, workload, names, repeats=2)}
    assert set(results) >= {name for name in SYSTEMS if not name.startswith("deepspeed")}
    assert results["free"].ratio == 1
    for name in ("zerompi-1", "zerompi-2", "zerompi-3", *ON_NODES, "ddp", "zero-redundancy"):
        assert results[name].loss == pytest.approx(results["fsdp2"].loss, rel=1e-5)
        assert results[name].seconds > 0
        assert results[name].processor > 0
        assert (results[name].reported is not None) == name.startswith("zerompi")


def test_steps_between_nodes_are_shown_by_what_they_send(comm, monkeypatch):
    nodes = zerompi.Topology(comm, ranks_per_node=1)
    monkeypatch.setattr(zerompi, "Topology", lambda comm, **options: nodes)
    monkeypatch.setattr("zerompi.collectives.group.Topology", lambda comm: nodes)
    workload = Workload(layers=2, width=32, heads=2, context=8, batch=1, steps=1)
    names = ["zerompi-1", "zerompi-3", *ON_NODES]
    numel = sum(p.numel() for p in workload.make_model().parameters())
    slow = 1e3  # bytes per second: no step is as slow
    results = {r.system: r for r in measure_training(comm, workload, names, 1, link=slow)}
    free = results["free"]
    assert (free.sent, free.of_bound) == (None, None)
    psi = 4 * numel * (comm.size - 1) / comm.size  # what a rank sends in a gather, or a reduction
    passes = dict.fromkeys(["zerompi-1", *ON_NODES], 2) | {"zerompi-3": 3}
    for name, times in passes.items():
        result = results[name]
        assert result.sent == pytest.approx(times * psi, rel=0.02), name  # headers, and padding
        if comm.size == 1:
            assert result.of_bound == pytest.approx(result.seconds / free.seconds)
        else:
            assert result.of_bound == pytest.approx(result.seconds / (result.sent / slow))


def test_systems_that_are_not_possible_or_do_not_differ_are_left_out(comm):
    def systems(nodes):
        return set(SYSTEMS) - set(worthwhile(zerompi.Topology(comm, ranks_per_node=nodes)))

    missing = {name for name in SYSTEMS if name not in available(zerompi.Topology(comm))}
    assert systems(comm.size) == missing | set(ON_NODES)
    if comm.size > 1:
        assert systems(1) == missing
    if comm.size > 2:
        assert systems((1, comm.size - 1)) == missing | {"zerompi-3-node"}


def test_the_link_is_given_in_gigabits_a_second(comm, command, monkeypatch):
    numbers = 1.5, 1.0, 2.5, 1, 2, 3, 4.5, 300_000_000, 1.25

    def measured(world, workload, systems, repeats, link):
        assert link == 1.25e9
        return [Trained("zerompi-3", *numbers)]

    monkeypatch.setattr("zerompi.bench.training.measure", measured)
    run = command("bench", "training", "--link", "10", "--systems", "zerompi-3")
    assert run.status == 0, run
    if comm.rank == 0:
        assert re.search(r"bound.*zerompi-3.*300.*1\.25", run.stdout, re.DOTALL), run


@pytest.mark.parametrize(("before", "link"), [(0, 0), (1, 0), (0, 1), (1, 1)])
def test_no_number_of_the_table_of_training_is_cut_at_80_columns(before, link):
    of_bound = 1.25 if link else None
    numbers = 12.3456, 0.987, 45.678, 10_239_400_000, 3_733_400_000, 2_031_400_000, 5.54321
    results = [Trained(name, *numbers, 1_234_400_000, of_bound) for name in SYSTEMS]
    table = table_of_training(results, {"free": 24.7} if before else {}, "")
    console = Console(width=80, record=True, file=StringIO())
    console.print(table)
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 80
    shown = "12345.6 0.99 45678 10239 3733 2031 5.54321 1234" + " 1.25" * link
    rows = [" ".join(re.findall(r"[^│\s]+", line)[1:]) for line in lines]
    assert rows.count(f"{shown} 2.00x") == before
    assert rows.count(shown) == len(SYSTEMS) - before


def test_a_build_that_deepspeed_would_wait_for_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    operator = tmp_path / "py_cpu" / "deepspeed_shm_comm"
    operator.mkdir(parents=True)
    (operator / "op.so").touch()
    assert locked_build() is None
    (operator / "lock").touch()
    assert locked_build() == operator / "lock"


def test_training_can_be_saved_drawn_and_compared(
    run_mpi: Callable[..., MPIRun], tmp_path: Path
) -> None:
    words = ["-m", "zerompi", "bench", "training", "--width", "32", "--layers", "1", "--heads", "2"]
    words += ["--systems", "zerompi-3", "--steps", "1", "--repeats", "1", "--fused"]
    saved, picture = tmp_path / "site.json", tmp_path / "site.png"
    job = run_mpi(2, [*words, "--out", saved, "--plot", picture])
    assert job.returncode == 0, job.output
    content = json.loads(saved.read_text())
    assert [row["system"] for row in content["results"]] == ["free", "zerompi-3"]
    assert content["workload"]["fused"]
    assert picture.read_bytes().startswith(b"\x89PNG")
    job = run_mpi(2, [*words, "--compare", saved])
    assert job.returncode == 0, job.output
    assert "before" in job.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sizes", "7"], "--sizes: expected sizes such as 64KiB or 16MiB, up to 1GiB, got '7'"),
        (["--sizes", "2GiB"], "--sizes: expected sizes such as"),
        (["--collectives", "gather"], "--collectives: expected some of reduce_scatter,"),
        (["--dtypes", "int8"], "--dtypes: expected some of float32,"),
        (["--repeats", "0"], "--repeats: expected at least 1, got 0"),
        (
            ["trainings"],
            "KIND: expected some of collectives, training, checkpoint, got 'trainings'",
        ),
        (["training", "--systems", "horovod"], "--systems: expected some of free, zerompi-1,"),
        (["training", "--heads", "5"], "--heads: expected a divisor of --width / 2 = 256, got 5"),
        (["checkpoint", "--fused"], "--fused: expected to measure training, got checkpoint"),
        (["training", "--link", "0"], "--link: expected more than 0 Gbit/s, got 0"),
        (["training", "--steps", "0"], "--steps: expected at least 1, got 0"),
        (["--sizes", "1KiB", "--repeats", "1", "--plot", "a.xyz"], "--plot: a.xyz: "),
        (["--compare", "/no/such/file"], "/no/such/file: No such file or directory"),
    ],
)
def test_wrong_arguments_are_one_line(comm, command, arguments, message):
    run = command("bench", *arguments)
    assert run.is_refusal(message, comm.rank), run


def test_every_system_saves_and_loads(comm, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "_QUIET", 0.01)  # no time is compared
    workload = Workload(layers=1, width=32, heads=2, context=8, batch=1, steps=1)
    names = list(checkpoints.SYSTEMS)
    results = checkpoints.measure(comm, workload, names, 1, comm.bcast(tmp_path))
    assert [result.system for result in results] == names
    for result in results:
        assert 0 < result.pause <= result.seconds
        assert result.first_pause > 0
        assert result.ratio == 1 if result.system == "zerompi" else result.ratio > 0
        assert (result.load is None) == (result.system == checkpoints.DISK)
        assert result.nbytes >= results[0].nbytes
    assert list(tmp_path.iterdir()) == []


LARGE = 12_345_678_901, 123.456, 103.447, 123.447, 117.746, 1_234_400_000, 1_234_500_000, 10.25
USUAL = 1_234_567_890, 12.345, 10.344, 12.344, 1.774, 123_400_000, 123_500_000, 0.75


@pytest.mark.parametrize("before", [{}, {"checkpoint torch.save": 20.0}])
@pytest.mark.parametrize(
    ("numbers", "shown"),
    [
        (LARGE, "12.35 123.46 10.25 103.45 123.45 117.75 0.10 1234 1234"),
        (USUAL, "1.23 12.35 0.75 10.34 12.34 1.77 0.70 123 124"),
    ],
)
def test_no_number_of_the_table_of_checkpoints_is_cut_at_80_columns(numbers, shown, before):
    names = list(checkpoints.SYSTEMS)
    table = table_of_checkpoints([checkpoints.Stored(n, *numbers) for n in names], before, "")
    console = Console(width=80, record=True, file=StringIO())
    console.print(table)
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 80
    rows = [line for line in lines if " ".join(re.findall(r"[^│\s]+", line)[1:10]) == shown]
    assert len(rows) == len(names)
    if numbers == USUAL:
        assert re.findall(r"[^┃\s]+", lines[1]) == [
            "system", "GB", "save", "ratio", "pause", "first", "load", "GB/s", "save+", "load+"
        ] + ["before"] * bool(before)  # fmt: skip
    if numbers == USUAL and not before:
        assert [re.findall(r"[^│\s]+", row)[0] for row in rows] == names
