"""What is written is what safetensors, transformers and the reader read."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest
import torch
from mpi4py import MPI
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from zerompi.checkpoint import CheckpointError, CheckpointReader, TensorTable, write_checkpoint
from zerompi.checkpoint.safetensors_file import DTYPES


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype is tensor.dtype
        assert found[name].shape == tensor.shape
        assert torch.equal(bits(found[name]), bits(tensor)), name


def read_all(reader: CheckpointReader) -> dict[str, Tensor]:
    tensors = {}
    for name, (shape, dtype) in reader.model_specs.items():
        out = torch.empty(shape, dtype=dtype)
        reader.read_model(name, 0, out.numel(), out.view(-1))
        tensors[name] = out
    return tensors


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    numel = torch.Size(shape).numel()
    if dtype is torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    raw = torch.randint(0, 256, (numel * dtype.itemsize,), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).view(shape)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_every_dtype_and_shape_reads_bit_for_bit_with_safetensors(
    dtype, save, shared_path, comm
) -> None:
    shapes = [(), (0,), (1,), (3, 0, 2), (5, 7), (2, 3, 4), (1001,)]
    tensors = {f"t{i}": random_bits(shape, dtype, i) for i, shape in enumerate(shapes)}
    save(shared_path / "c", tensors, comm)
    assert_same(load_file(shared_path / "c/model.safetensors"), tensors)
    with CheckpointReader(shared_path / "c") as reader:
        assert_same(read_all(reader), tensors)


def test_mixed_dtypes_in_one_file(save, shared_path, comm) -> None:
    tensors = {
        f"{name}.{i}": random_bits((i,), dtype, i)
        for i, (name, dtype) in enumerate(DTYPES.items(), start=1)
    }
    save(shared_path / "c", tensors, comm)
    assert_same(load_file(shared_path / "c/model.safetensors"), tensors)


def test_file_has_the_metadata_that_transformers_expects(save, shared_path, comm) -> None:
    save(shared_path / "c", {"a": torch.ones(3)}, comm)
    raw = (shared_path / "c/model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    assert length % 8 == 0
    assert json.loads(raw[8 : 8 + length])["__metadata__"] == {"format": "pt"}
    with safe_open(shared_path / "c/model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_optimizer_and_state_come_back(save, shared_path, comm, random_tensors) -> None:
    optimizer = {f"exp_avg.{name}": t for name, t in random_tensors(1).items()}
    state = {"extra": {"epoch": 3, "losses": [0.5, None]}, "names": {"ä": True}}
    save(shared_path / "c", random_tensors(0), comm, optimizer=optimizer, state=state)
    assert_same(load_file(shared_path / "c/optimizer.safetensors"), optimizer)
    with CheckpointReader(shared_path / "c") as reader:
        assert {key: reader.state[key] for key in state} == state
        assert reader.state["format_version"] == 1
        assert reader.state["ranks"] == comm.size
        assert reader.state["versions"]["torch"] == torch.__version__
        for name, tensor in optimizer.items():
            assert reader.optimizer_specs[name] == (tuple(tensor.shape), tensor.dtype)
            out = torch.empty(tensor.numel(), dtype=tensor.dtype)
            reader.read_optimizer(name, 0, tensor.numel(), out)
            assert torch.equal(bits(out), bits(tensor))


def test_no_optimizer_file_without_optimizer_tensors(save, shared_path, comm) -> None:
    save(shared_path / "c", {"a": torch.ones(3)}, comm)
    assert sorted(p.name for p in (shared_path / "c").iterdir()) == [
        "model.safetensors",
        "state.json",
    ]


def test_a_model_without_tensors_is_a_checkpoint(save, shared_path, comm) -> None:
    save(shared_path / "c", {}, comm, state={"extra": 1})
    assert load_file(shared_path / "c/model.safetensors") == {}
    with CheckpointReader(shared_path / "c") as reader:
        assert reader.model_specs == {}
        assert reader.state["extra"] == 1


def test_any_range_reads_whatever_ranks_wrote(save, shared_path, comm) -> None:
    tensor = torch.arange(101, dtype=torch.int64)
    save(shared_path / "c", {"a": torch.ones(9), "t": tensor}, comm)
    with CheckpointReader(shared_path / "c") as reader:
        for start in range(0, 102, 7):
            for stop in range(start, 102, 5):
                out = torch.full((stop - start,), -1)
                reader.read_model("t", start, stop, out)
                assert torch.equal(out, tensor[start:stop])


def test_tensors_of_several_pieces(save, shared_path, comm) -> None:
    tensor = torch.arange(3_000_000, dtype=torch.float32)  # 12 MB: pieces have 4 MiB
    save(shared_path / "c", {"t": tensor}, comm)
    assert torch.equal(load_file(shared_path / "c/model.safetensors")["t"], tensor)
    with CheckpointReader(shared_path / "c") as reader:
        for start, stop in [(0, 3_000_000), (1_048_575, 1_048_577), (999_999, 2_999_999)]:
            out = torch.empty(stop - start)
            reader.read_model("t", start, stop, out)
            assert torch.equal(out, tensor[start:stop])


def test_reading_a_little_of_a_large_tensor_reads_little(
    save, shared_path, comm, monkeypatch
) -> None:
    save(shared_path / "c", {"t": torch.arange(6_000_000, dtype=torch.float32)}, comm)
    requested, original = [], os.preadv

    def counting(descriptor, buffers, offset):
        requested.extend(len(buffer) for buffer in buffers)
        return original(descriptor, buffers, offset)

    with CheckpointReader(shared_path / "c") as reader:
        monkeypatch.setattr(os, "preadv", counting)
        reader.read_model("t", 5_000_000, 5_000_002, torch.empty(2))
    assert 0 < sum(requested) <= 2 * 4 * 2**20


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float64])
def test_reading_casts_to_the_dtype_of_out(stored, save, shared_path, comm) -> None:
    tensor = torch.randn(50, generator=torch.Generator().manual_seed(0)).to(stored)
    save(shared_path / "c", {"t": tensor}, comm)
    with CheckpointReader(shared_path / "c") as reader:
        out = torch.empty(20)
        reader.read_model("t", 10, 30, out)
        assert torch.equal(out, tensor[10:30].float())


def test_reading_refuses_to_change_the_kind_of_number(save, shared_path, comm) -> None:
    save(shared_path / "c", {"t": torch.ones(4)}, comm)
    with (
        CheckpointReader(shared_path / "c") as reader,
        pytest.raises(CheckpointError, match="int64"),
    ):
        reader.read_model("t", 0, 4, torch.empty(4, dtype=torch.int64))


@pytest.mark.parametrize(
    ("name", "start", "stop", "numel"),
    [("u", 0, 1, 1), ("t", 0, 5, 5), ("t", -1, 1, 2), ("t", 3, 2, 0), ("t", 0, 2, 3)],
)
def test_reading_refuses_what_is_not_there(
    name, start, stop, numel, save, shared_path, comm
) -> None:
    save(shared_path / "c", {"t": torch.ones(4)}, comm)
    with CheckpointReader(shared_path / "c") as reader, pytest.raises(CheckpointError, match=name):
        reader.read_model(name, start, stop, torch.empty(numel))


# -- several files -----------------------------------------------------------------------------


def test_large_models_have_several_files_and_an_index(
    save, shared_path, comm, random_tensors
) -> None:
    tensors = random_tensors(0)
    optimizer = {f"exp_avg.{name}": t for name, t in random_tensors(1).items()}
    save(shared_path / "c", tensors, comm, optimizer=optimizer, max_shard_nbytes=170)
    for stem, expected in [("model", tensors), ("optimizer", optimizer)]:
        index = json.loads((shared_path / f"c/{stem}.safetensors.index.json").read_text())
        names = sorted(set(index["weight_map"].values()))
        assert names == [f"{stem}-{i + 1:05d}-of-{len(names):05d}.safetensors" for i in range(2)]
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in expected.values())
        found = {}
        for name in names:
            of_file = load_file(shared_path / "c" / name)
            assert sum(t.nbytes for t in of_file.values()) <= 170
            assert all(index["weight_map"][key] == name for key in of_file)
            found.update(of_file)
        assert_same(found, expected)
    with CheckpointReader(shared_path / "c") as reader:
        assert_same(read_all(reader), tensors)
        assert reader.optimizer_specs.keys() == optimizer.keys()


def test_a_tensor_beyond_the_limit_has_its_own_file(save, shared_path, comm) -> None:
    tensors = {"a": torch.ones(2), "b": torch.ones(100), "c": torch.ones(2)}
    save(shared_path / "c", tensors, comm, max_shard_nbytes=16)
    assert len(list((shared_path / "c").glob("model-*-of-00003.safetensors"))) == 3
    with CheckpointReader(shared_path / "c") as reader:
        assert_same(read_all(reader), tensors)


# -- Hugging Face directories ------------------------------------------------------------------


def test_a_plain_directory_of_safetensors_reads(tmp_path: Path, random_tensors) -> None:
    save_file(random_tensors(0), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    with CheckpointReader(tmp_path) as reader:
        assert_same(read_all(reader), random_tensors(0))
        assert reader.state == {}
        assert reader.optimizer_specs == {}


@pytest.mark.parametrize("max_shard_nbytes", [10_000_000, 20_000])
def test_transformers_and_we_read_each_other(
    max_shard_nbytes, save, shared_path, comm, tmp_path
) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=64, n_positions=32)
    model = transformers.GPT2LMHeadModel(config)
    tensors = {k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}  # tied
    save(shared_path / "c", tensors, comm, max_shard_nbytes=max_shard_nbytes)
    comm.Barrier()
    if comm.rank == 0:
        config.save_pretrained(shared_path / "c")
    comm.Barrier()
    again = transformers.GPT2LMHeadModel.from_pretrained(shared_path / "c")
    assert_same(dict(again.state_dict()), dict(model.state_dict()))
    base = transformers.AutoModel.from_pretrained(shared_path / "c")
    assert_same(dict(base.state_dict()), dict(model.transformer.state_dict()))
    model.save_pretrained(tmp_path / "hf", max_shard_size=max_shard_nbytes)
    with CheckpointReader(tmp_path / "hf") as reader:
        assert_same(read_all(reader), tensors)


def test_readers_of_several_threads_share_a_file(save, shared_path, comm) -> None:
    tensor = torch.arange(10_000)
    save(shared_path / "c", {"t": tensor}, comm)
    found = torch.zeros_like(tensor)
    with CheckpointReader(shared_path / "c") as reader:
        threads = [
            threading.Thread(target=reader.read_model, args=("t", i * 1000, i * 1000 + 1000, out))
            for i, out in enumerate(found.split(1000))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert torch.equal(found, tensor)


def test_ranks_without_slices_take_part(shared_path: Path, comm: MPI.Intracomm, make_table) -> None:
    tensors = {"a": torch.arange(6.0)}
    table = make_table(tensors, 0, 1)
    mine = table if comm.rank == comm.size - 1 else TensorTable(table.specs, [])
    write_checkpoint(shared_path / "c", mine, TensorTable({}, []), {}, comm)
    assert_same(load_file(shared_path / "c/model.safetensors"), tensors)
