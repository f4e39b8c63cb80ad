"""A checkpoint carries on bit for bit at the same size, and at any size and stage."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from mpi4py import MPI
from safetensors.torch import load_file, save_file

import zerompi
from harness.cover import all_cases
from models import CASES, build, own_slice

STAGES = [0, 1, 2, 3]
BFLOAT16 = zerompi.MixedPrecision(torch.bfloat16)
FLOAT16 = zerompi.MixedPrecision(torch.float16)


@pytest.fixture
def shared(comm, tmp_path) -> Path:
    """Rank 0's temporary directory, on all ranks."""
    return comm.bcast(tmp_path)


def steps(comm, case, model, optimizer, numbers):
    losses = []
    for step in numbers:
        x, y = own_slice(case.batch(step), comm.rank, comm.size)
        noise = torch.rand(())  # of a generator that the checkpoint restores
        loss = case.loss(model(x), y) * (1 + 0.01 * noise)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    ("precision", "optimizer_name"),
    [(None, "two_groups"), (None, "sgd"), (BFLOAT16, "two_groups"), (FLOAT16, "adamw")],
    ids=["float32", "float32-sgd", "bfloat16", "float16"],
)
@pytest.mark.parametrize("stage", STAGES)
def test_training_continues_bit_for_bit(comm, shared, stage, precision, optimizer_name):
    case = CASES["tied"]
    options = {"stage": stage, "comm": comm, "mixed_precision": precision}
    torch.manual_seed(50 + comm.rank)
    model, optimizer = build(case, optimizer_name)
    with zerompi.partition(model, optimizer, **options) as zero:
        steps(comm, case, model, optimizer, range(3))
        zero.save(shared / "step-3", extra={"step": 3})
        expected = steps(comm, case, model, optimizer, range(3, 6))
        expected_state = zero.full_state_dict()
    model, optimizer = build(case, optimizer_name, seed=99)
    with zerompi.partition(model, optimizer, **options) as zero:
        assert zero.load(shared / "step-3") == {"step": 3}
        assert steps(comm, case, model, optimizer, range(3, 6)) == expected
        state = zero.full_state_dict()
        assert all(torch.equal(state[key], expected_state[key]) for key in state)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("written_at", STAGES)
def test_any_stage_loads_what_any_stage_wrote(comm, shared, written_at, stage):
    case = CASES["gpt"]
    model, optimizer = build(case)
    with zerompi.partition(model, optimizer, stage=written_at, comm=comm) as zero:
        steps(comm, case, model, optimizer, range(2))
        zero.save(shared / "a")
    model, optimizer = build(case, seed=99)
    with zerompi.partition(model, optimizer, stage=stage, comm=comm) as zero:
        zero.load(shared / "a")
        zero.save(shared / "b")
    if comm.rank == 0:
        for name in ("model", "optimizer"):
            first, second = (load_file(shared / d / f"{name}.safetensors") for d in "ab")
            assert first.keys() == second.keys()
            assert all(torch.equal(first[key], second[key]) for key in first)


LAYOUTS = ["replicas", "bfloat16", "float16", "nodes", "copies", "quantized", "copies of two"][
    : 7 if MPI.COMM_WORLD.size % 2 == 0 else 6
]


def layouts(comm):
    """Arguments of partition under which the same weights and states lie differently, by name."""
    nodes = zerompi.Topology(comm, ranks_per_node=2)
    scaled = zerompi.MixedPrecision(torch.float16, loss_scale=8.0)  # so that no step overflows
    found = {
        "replicas": {"stage": 0},
        "bfloat16": {"stage": 2, "mixed_precision": BFLOAT16},
        "float16": {"stage": 3, "mixed_precision": scaled},
        "nodes": {"stage": 3, "topology": nodes, "node_cache": True},
        "copies": {"stage": 3, "shard_ranks": 1},
        "quantized": {"stage": 3, "topology": nodes, "quantize": zerompi.Quantize(block=32)},
    }
    if comm.size % 2 == 0:
        found["copies of two"] = {"stage": 2, "shard_ranks": 2, "mixed_precision": BFLOAT16}
    return found


@pytest.mark.parametrize("name", ["lora", "tied"])
@pytest.mark.parametrize("written_as", LAYOUTS)
def test_any_layout_loads_what_any_layout_wrote(comm, shared, written_as, name):
    """Frozen and tied parameters among them; saved again, the same bytes.

    What is frozen has no main weights: it is rounded to the dtype of the parameters of each layout.
    Each layout is tried with a third of all, other ones with another model or number of ranks, unless all cases run.
    """
    case = CASES[name]
    model, optimizer = build(case)
    frozen = {key for key, parameter in model.named_parameters() if not parameter.requires_grad}
    assert bool(frozen) == (name == "lora")
    with zerompi.partition(model, optimizer, comm=comm, **layouts(comm)[written_as]) as zero:
        steps(comm, case, model, optimizer, range(2))
        zero.save(shared / "a")
    turn = list(layouts(comm)).index(written_as) + (name == "lora") + comm.size // 2
    for number, (read_as, options) in enumerate(layouts(comm).items()):
        if (turn + number) % 3 and not all_cases():
            continue
        model, optimizer = build(case, seed=99)
        with zerompi.partition(model, optimizer, comm=comm, **options) as zero:
            zero.load(shared / "a")
            zero.save(shared / f"b-{number}")
        for stem in ("model", "optimizer"):
            first, second = (
                load_file(shared / d / f"{stem}.safetensors") for d in ("a", f"b-{number}")
            )
            assert first.keys() == second.keys()
            for key, value in first.items():
                if key in frozen:
                    precision = options.get("mixed_precision")
                    value = value.to(torch.float32 if precision is None else precision.param_dtype)
                assert second[key].dtype is value.dtype, (read_as, stem, key)
                assert torch.equal(second[key], value), (read_as, stem, key)


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_another_number_of_ranks_loads_it(comm, shared, stage):
    """Written by all ranks, read by one, written again: the same bytes."""
    case = CASES["mlp"]
    model, optimizer = build(case)
    with zerompi.partition(model, optimizer, stage=stage, comm=comm) as zero:
        steps(comm, case, model, optimizer, range(2))
        zero.save(shared / "a")
    alone = comm.Split(comm.rank, 0)
    if comm.rank == comm.size - 1:
        model, optimizer = build(case, seed=99)
        with zerompi.partition(model, optimizer, stage=3, comm=alone) as zero:
            zero.load(shared / "a")
            zero.save(shared / "b")
    alone.Free()
    comm.Barrier()
    for name in ("model", "optimizer"):
        first, second = (load_file(shared / d / f"{name}.safetensors") for d in "ab")
        assert all(torch.equal(first[key], second[key]) for key in first)
        assert first.keys() == second.keys()


@pytest.mark.parametrize("shard_ranks", [n for n in (2, 1) if MPI.COMM_WORLD.size % n == 0])
def test_several_copies_write_each_element_once(comm, shared, shard_ranks):
    case = CASES["mlp"]
    model, optimizer = build(case)
    with zerompi.partition(model, optimizer, comm=comm, shard_ranks=shard_ranks) as zero:
        steps(comm, case, model, optimizer, range(2))
        state = zero.full_state_dict()
        zero.save(shared / "a")
        zero.load(shared / "a")
    saved = load_file(shared / "a" / "model.safetensors")
    assert all(torch.equal(saved[key], state[key]) for key in saved)


def test_files_have_the_names_that_other_tools_expect(comm, shared):
    case = CASES["tied"]
    model, optimizer = build(case)
    names = {name for name, _ in model.named_parameters()}
    with zerompi.partition(model, optimizer, comm=comm) as zero:
        steps(comm, case, model, optimizer, range(1))
        zero.save(shared / "a", extra={"note": "x"})
    assert set(load_file(shared / "a" / "model.safetensors")) == names
    optimizer_names = set(load_file(shared / "a" / "optimizer.safetensors"))
    assert optimizer_names == {f"{k}.{n}" for k in ("exp_avg", "exp_avg_sq", "step") for n in names}
    state = json.loads((shared / "a" / "state.json").read_text())
    assert state["extra"] == {"note": "x"}
    assert state["optimizer"]["param_groups"][0]["lr"] == 1e-3


@pytest.mark.parametrize("stage", STAGES)
def test_meta_model_loads_a_plain_directory_of_weights(comm, shared, stage):
    """As Hugging Face writes it: safetensors, other dtypes, no state."""
    case = CASES["cnn"]
    reference, _ = build(case)
    if comm.rank == 0:
        (shared / "hf").mkdir()
        save_file(reference.state_dict(), shared / "hf" / "model.safetensors")
    comm.Barrier()
    with torch.device("meta"):
        model = case.make()
    optimizer = torch.optim.AdamW(model.parameters())
    with zerompi.partition(model, optimizer, stage=stage, comm=comm) as zero:
        assert zero.load(shared / "hf") == {}
        state = zero.full_state_dict()
        assert all(torch.equal(state[k], v) for k, v in reference.state_dict().items())
        x, _ = case.batch(0)
        with torch.no_grad():
            torch.testing.assert_close(model(x), reference(x))


def test_a_checkpoint_of_another_model_is_refused_and_changes_nothing(comm, shared):
    model, optimizer = build(CASES["mlp"])
    with zerompi.partition(model, optimizer, comm=comm) as zero:
        zero.save(shared / "mlp")
    model, optimizer = build(CASES["gpt"])
    with zerompi.partition(model, optimizer, comm=comm) as zero:
        before = zero.full_state_dict()
        with pytest.raises(zerompi.ZerompiError, match="not of this model.*missing: "):
            zero.load(shared / "mlp")
        after = zero.full_state_dict()
        assert all(torch.equal(before[key], after[key]) for key in before)


def test_other_param_groups_are_refused(comm, shared):
    case = CASES["gpt"]
    model, optimizer = build(case, "two_groups")
    with zerompi.partition(model, optimizer, comm=comm) as zero:
        zero.save(shared / "a")
    model, optimizer = build(case, "adamw", seed=99)
    with zerompi.partition(model, optimizer, comm=comm) as zero:
        before = zero.full_state_dict()
        with pytest.raises(zerompi.ZerompiError, match="has 2 param groups"):
            zero.load(shared / "a")
        after = zero.full_state_dict()
        assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_missing_checkpoint_is_an_error_on_all_ranks(comm, shared):
    model, optimizer = build(CASES["mlp"])
    with (
        zerompi.partition(model, optimizer, comm=comm) as zero,
        pytest.raises(zerompi.ZerompiError, match="nowhere"),
    ):
        zero.load(shared / "nowhere")
    zero.close()


def test_extra_that_is_not_json_is_refused_on_all_ranks(comm, shared):
    model, optimizer = build(CASES["mlp"])
    with zerompi.partition(model, optimizer, comm=comm) as zero:
        extra = {"model": model} if comm.rank == 0 else {}
        with pytest.raises((TypeError, zerompi.ZerompiError), match="JSON"):
            zero.save(shared / "a", extra=extra)
        assert not (shared / "a").exists()
