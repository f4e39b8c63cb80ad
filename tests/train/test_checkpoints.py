"""Which checkpoints of a run are kept, and which one it may continue from."""

from __future__ import annotations

from pathlib import Path

import pytest
from mpi4py import MPI

from zerompi.train.agreement import agree_on_root
from zerompi.train.checkpoints import prepare_output, save_checkpoint
from zerompi.train.config import InputError, TrainConfig
from zerompi.train.job import prepare


def _make(directory: Path, *steps: int) -> None:
    for step in steps:
        path = directory / "checkpoints" / f"step-{step}"
        path.mkdir(parents=True)
        (path / "state.json").write_text("{}")


@pytest.fixture
def out(comm: MPI.Intracomm, tmp_path: Path) -> Path:
    """A directory that all ranks share."""
    return comm.bcast(tmp_path)


@pytest.mark.parametrize("resume", ["step-4", "elsewhere"])
def test_only_the_latest_checkpoint_of_the_output_is_continued(
    comm: MPI.Intracomm, out: Path, resume: str
) -> None:
    def make() -> Path:
        _make(out, 4, 6)
        _make(out / "other", 4)
        other = out / "other" / "checkpoints" / "step-4"
        return other if resume == "elsewhere" else out / "checkpoints" / resume

    path = agree_on_root(comm, make)
    with pytest.raises(InputError, match=r"expected the latest checkpoint in --out, .*/step-6; to"):
        prepare_output(TrainConfig(out=str(out), resume=str(path)), comm)
    latest = out / "checkpoints" / ".." / "checkpoints" / "step-6"
    for named in ("latest", str(latest)):
        chosen = prepare_output(TrainConfig(out=str(out), resume=named), comm)
        assert chosen is not None
        assert chosen.resolve().name == "step-6"
    assert prepare_output(TrainConfig(out=str(out / "new"), resume=str(path)), comm) == path


@pytest.mark.parametrize(
    ("keep", "kept", "blocking"),
    [
        (1, {"step-5"}, True),
        (2, {"step-5", "step-4"}, False),
        (0, {"step-5", "step-4", "step-3"}, True),
    ],
)
def test_a_saved_checkpoint_replaces_older_ones_never_itself(
    comm: MPI.Intracomm, out: Path, keep: int, kept: set[str], blocking: bool
) -> None:
    def make() -> None:
        _make(out, 3, 4, 16)  # 16: put there by somebody else meanwhile
        (out / "checkpoints" / "step-best").mkdir()
        (out / "text").write_text("to be, or not to be " * 50)

    agree_on_root(comm, make)
    config = TrainConfig(
        out=str(out), data=str(out / "text"), keep=keep, layers=1, width=8, heads=1, context=8
    )
    job = prepare(config, comm)
    path = save_checkpoint(job, 5, blocking=blocking)
    job.zero.close()
    assert path.name == "step-5"
    names = {other.name for other in path.parent.iterdir() if other.name[0] != "."}
    assert names == {*kept, "step-16", "step-best", "latest"}
