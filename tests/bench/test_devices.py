"""`zerompi bench collectives --device cuda`: CuPy arrays beside host ones, each transport."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from harness.memory import HAS_DEVICE, WITHOUT_DEVICE
from harness.mpirun import MPIRun

_WORDS = ["-m", "zerompi", "bench", "--sizes", "1KiB", "--repeats", "1", "--device", "cuda"]


@pytest.mark.skipif(not HAS_DEVICE, reason=WITHOUT_DEVICE)
@pytest.mark.parametrize("transport", [None, "cuda-aware"])
def test_each_transport_is_measured(
    run_mpi: Callable[..., MPIRun],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    transport: str | None,
) -> None:
    monkeypatch.setenv("CUEMU_PROTECT", "0" if transport else "1")
    if transport:
        monkeypatch.setenv("ZEROMPI_DEVICE_TRANSPORT", transport)
    saved = tmp_path / "site.json"
    words = [*_WORDS, "--share-devices", "--dtypes", "float32,bfloat16", "--out", saved]
    job = run_mpi(2, words)
    assert job.returncode == 0, job.output
    rows = json.loads(saved.read_text())["results"]
    expected = {f"device {transport}"} if transport else {"device staged", "device ipc"}
    for collective in ("reduce_scatter", "all_gather", "all_reduce"):
        for dtype in ("float32", "bfloat16"):
            found = [r for r in rows if r["collective"] == collective and r["dtype"] == dtype]
            ways = {row["way"] for row in found}
            assert {way for way in ways if way.startswith("device")} == {*expected, "device copy"}
            assert {"messages", "copy"} <= ways
            assert all(row["seconds"] > 0 for row in found)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--device", "tpu"], "--device: expected cpu or cuda, got 'tpu'"),
        (["training", "--device", "cuda"], "--device: expected cpu to measure training, got cuda"),
    ],
)
def test_wrong_devices_are_one_line(
    run_mpi: Callable[..., MPIRun], words: list[str], message: str
) -> None:
    job = run_mpi(2, ["-m", "zerompi", "bench", *words])
    assert job.returncode == 2, job.output
    assert job.stderr.count("error: ") == 1
    assert message in job.stderr


@pytest.mark.skipif(not HAS_DEVICE, reason=WITHOUT_DEVICE)
def test_too_few_devices_are_one_line(run_mpi: Callable[..., MPIRun]) -> None:
    job = run_mpi(2, _WORDS)
    assert job.returncode == 2, job.output
    assert "use_device: expected a device for each rank" in job.stderr
