"""Damaged files: the reader says which file, and never gives out wrong numbers."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mpi4py import MPI
from safetensors.torch import save_file

from zerompi.checkpoint import CheckpointError, CheckpointReader

settings.register_profile(
    "files", deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)
few = settings(settings.get_profile("files"), max_examples=150)

TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).view(2, 3),
    "b": torch.arange(5, dtype=torch.int64),
    "c": torch.tensor(True),
}


def read_everything(path: Path) -> dict[str, torch.Tensor]:
    found = {}
    with CheckpointReader(path) as reader:
        for specs, read in [
            (reader.model_specs, reader.read_model),
            (reader.optimizer_specs, reader.read_optimizer),
        ]:
            for name, (shape, dtype) in specs.items():
                out = torch.empty(shape, dtype=dtype)
                read(name, 0, out.numel(), out.view(-1))
                found[name] = out
    return found


def try_to_read(path: Path) -> tuple[dict[str, torch.Tensor] | None, str]:
    """What was read, or None and the message of the refusal."""
    try:
        return read_everything(path), ""
    except CheckpointError as error:
        return None, str(error)


def is_right(found: dict[str, torch.Tensor]) -> bool:
    return found.keys() == TENSORS.keys() and all(
        found[name].dtype is tensor.dtype and torch.equal(found[name], tensor)
        for name, tensor in TENSORS.items()
    )


@pytest.fixture
def checkpoint(tmp_path: Path, save: Callable[..., None]) -> Path:
    """A checkpoint of TENSORS for each rank."""
    save(tmp_path / "c", TENSORS, MPI.COMM_SELF)
    return tmp_path / "c"


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """A directory with TENSORS that has no checksums."""
    (tmp_path / "plain").mkdir()
    save_file(TENSORS, tmp_path / "plain" / "model.safetensors")
    return tmp_path / "plain"


def read_header(path: Path) -> tuple[dict, bytes]:
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def write_header(path: Path, header: object, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


@few
@given(data=st.data())
def test_a_flipped_bit_anywhere_is_found(data, checkpoint) -> None:
    path = checkpoint / "model.safetensors"
    raw = path.read_bytes()
    position = data.draw(st.integers(0, len(raw) - 1))
    damaged = bytearray(raw)
    damaged[position] ^= data.draw(st.integers(1, 255))
    path.write_bytes(damaged)
    found, message = try_to_read(checkpoint)
    path.write_bytes(raw)
    assert found is None
    assert "model.safetensors" in message


@few
@given(data=st.data())
def test_a_damaged_state_never_gives_wrong_numbers(data, checkpoint) -> None:
    path = checkpoint / "state.json"
    raw = path.read_bytes()
    damaged = bytearray(raw)
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(damaged)
    found, message = try_to_read(checkpoint)
    path.write_bytes(raw)
    assert str(checkpoint) in message if found is None else is_right(found)


@pytest.mark.parametrize("name", ["model.safetensors", "state.json"])
def test_a_file_cut_off_anywhere_is_refused(name, checkpoint) -> None:
    path = checkpoint / name
    raw = path.read_bytes()
    # The last byte of state.json is a newline.
    for length in range(len(raw) - 1):
        path.write_bytes(raw[:length])
        with pytest.raises(CheckpointError, match=name):
            read_everything(checkpoint)


@few
@given(data=st.data())
def test_a_damaged_header_without_checksum_raises_nothing_else(data, plain) -> None:
    path = plain / "model.safetensors"
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    damaged = bytearray(raw)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, length + 7))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.one_of(st.none(), st.integers(0, len(raw))))
    path.write_bytes(damaged[:cut])
    found, message = try_to_read(plain)
    path.write_bytes(raw)
    if found is None:
        assert str(path) in message
    else:
        # Names and dtypes of the same width may have changed; no byte is read twice or not at all.
        assert sum(t.nbytes for t in found.values()) == sum(t.nbytes for t in TENSORS.values())


def entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("header", "match"),
    [
        (b"not json", "JSON"),
        (b"\xff\xfe{}", "JSON"),
        (b"[" * 100_000, "JSON"),
        (b'{"a": 1' + b"0" * 5000 + b"}", "JSON|expected dtype"),
        (b'{"a": {}, "a": {}}', "twice"),
        ([], "object"),
        ({"a": 3}, "dtype, shape and data_offsets"),
        ({"a": {"dtype": "F32"}}, "dtype, shape and data_offsets"),
        ({"__metadata__": {"format": 3}}, "__metadata__"),
        ({"a": entry("F31")}, "F31"),
        ({"a": entry(None)}, "None"),
        ({"a": entry(shape=[-2])}, "shape"),
        ({"a": entry(shape=[2.0])}, "shape"),
        ({"a": entry(shape=[True, 2])}, "shape"),
        ({"a": entry(shape="2")}, "shape"),
        ({"a": entry(offsets=[0])}, "data_offsets"),
        ({"a": entry(offsets=[-8, 0])}, "data_offsets"),
        ({"a": entry(offsets=[8, 0])}, "expected 8 bytes"),
        ({"a": entry(shape=[3])}, "expected 12 bytes"),
        ({"a": entry(shape=[2**40, 2**40])}, "expected 4835703278458516698824704 bytes"),
        ({"a": entry(offsets=[8, 16])}, "a gap"),
        ({"a": entry(), "b": entry(offsets=[4, 12])}, "overlap"),
        ({"a": entry(), "b": entry(offsets=[0, 8])}, "overlap"),
        ({"a": entry(), "b": entry(offsets=[8, 16]), "c": entry(offsets=[16, 24])}, "cut off"),
        ({"a": entry()}, "damaged"),
    ],
)
def test_an_invalid_header_is_refused(header, match, tmp_path) -> None:
    write_header(tmp_path / "model.safetensors", header, bytes(16))
    with pytest.raises(CheckpointError, match=match) as caught:
        CheckpointReader(tmp_path)
    assert str(tmp_path / "model.safetensors") in str(caught.value)


def test_an_endless_header_is_refused_unread(tmp_path) -> None:
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", 2**62) + b"{}")
    with pytest.raises(CheckpointError, match="no safetensors file"):
        CheckpointReader(tmp_path)


def test_a_file_of_another_checkpoint_is_refused(checkpoint, save, tmp_path) -> None:
    save(tmp_path / "d", {**TENSORS, "c": torch.tensor(False)}, MPI.COMM_SELF)
    shutil.copy(tmp_path / "d/model.safetensors", checkpoint)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: bytes .* damaged"):
        read_everything(checkpoint)


# -- the directory -----------------------------------------------------------------------------


@pytest.mark.parametrize("version", [2, 1_000, "1", None, True, 0])
def test_other_format_versions_are_refused(version, checkpoint) -> None:
    state = json.loads((checkpoint / "state.json").read_text())
    (checkpoint / "state.json").write_text(json.dumps({**state, "format_version": version}))
    with pytest.raises(CheckpointError, match=r"state\.json: format_version"):
        CheckpointReader(checkpoint)


def test_a_newer_format_says_so(checkpoint) -> None:
    state = json.loads((checkpoint / "state.json").read_text())
    (checkpoint / "state.json").write_text(json.dumps({**state, "format_version": 2}))
    with pytest.raises(CheckpointError, match="a newer zerompi"):
        CheckpointReader(checkpoint)


def test_missing_paths_are_named(tmp_path) -> None:
    with pytest.raises(CheckpointError, match=r"absent: .* nothing there"):
        CheckpointReader(tmp_path / "absent")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"file: .* a file"):
        CheckpointReader(tmp_path / "file")
    with pytest.raises(CheckpointError, match=r"expected model\.safetensors or .* got neither"):
        CheckpointReader(tmp_path)


def test_pickled_weights_are_refused_with_the_way_out(tmp_path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: convert it to safetensors"):
        CheckpointReader(tmp_path)


@pytest.mark.parametrize("stem", ["model", "optimizer"])
@pytest.mark.parametrize("sharded", [False, True])
def test_missing_files_are_named(sharded, stem, tmp_path, save) -> None:
    limit = 24 if sharded else 1000
    optimizer = {f"exp_avg.{name}": t for name, t in TENSORS.items()}
    save(tmp_path / "c", TENSORS, MPI.COMM_SELF, optimizer=optimizer, max_shard_nbytes=limit)
    for path in sorted((tmp_path / "c").glob(f"{stem}*")):
        raw = path.read_bytes()
        path.unlink()
        with pytest.raises(CheckpointError, match=stem) as caught:
            CheckpointReader(tmp_path / "c")
        if not path.name.endswith("index.json"):
            assert path.name in str(caught.value)
        path.write_bytes(raw)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"{", "JSON"),
        (b"{}", "weight_map"),
        (b'{"weight_map": {"a": 3}}', "a: .* 3"),
        (b'{"weight_map": {"a": "../x/model.safetensors"}}', "beside it"),
        (b'{"weight_map": {"a": "/etc/passwd"}}', "beside it"),
        (b'{"weight_map": {"a": "\\ud800.safetensors"}}', "beside it"),
        (b'{"weight_map": {"a": "absent.safetensors"}}', "absent.safetensors"),
        (b'{"weight_map": {"z": "part.safetensors"}}', r"part\.safetensors: expected a tensor z"),
    ],
)
def test_a_damaged_index_is_refused(content, match, plain) -> None:
    (plain / "model.safetensors").rename(plain / "part.safetensors")
    (plain / "model.safetensors.index.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=match) as caught:
        CheckpointReader(plain)
    assert str(plain) in str(caught.value)


def test_a_refused_checkpoint_leaves_no_file_open(plain) -> None:
    (plain / "model.safetensors").write_bytes(b"damaged")
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(5):
        with pytest.raises(CheckpointError):
            CheckpointReader(plain)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_closed_reader_leaves_no_file_open(plain) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    with CheckpointReader(plain):
        assert len(list(Path("/proc/self/fd").iterdir())) == before + 1
    assert len(list(Path("/proc/self/fd").iterdir())) == before
