"""Training with quantized messages: close to exact training, bytes as in theory, clear refusals."""

from __future__ import annotations

import pytest
import torch
from mpi4py import MPI
from torch import nn

import zerompi
from harness.memory import ON_DEVICE, may_read_neighbours
from models import CASES, GPT, build, one_each, step
from test_report import by_label
from test_stages import partitioned_losses
from zerompi import Quantize

LAYOUTS = [[2, 2], [3, 1], [1, 1, 1, 1], [2, 1], [1, 1], [4], [2], [1]]
FITTING = [
    (sizes, memory)
    for sizes in LAYOUTS
    for memory in ("shared", "messages")
    if sum(sizes) == MPI.COMM_WORLD.size and (memory == "messages") <= (max(sizes) > 1)
]


@pytest.fixture(params=FITTING, ids=lambda case: "+".join(map(str, case[0])) + f" {case[1]}")
def layout(request, comm, monkeypatch):
    """A topology, and whether gradients, and weights, are quantized between its ranks.

    A node's ranks share one copy of the weights on the host, but not on a device.
    """
    sizes, memory = request.param
    monkeypatch.setenv("ZEROMPI_SHARED_MEMORY", "1" if memory == "shared" else "0")
    gradients = len(sizes) > 1 or (comm.size > 1 and not may_read_neighbours())
    weights = gradients or (comm.size > 1 and ON_DEVICE)
    return zerompi.Topology(comm, ranks_per_node=sizes), gradients, weights


# -- results -----------------------------------------------------------------------------------


@pytest.mark.cover(1)
@pytest.mark.parametrize(
    ("stage", "name", "options"),
    [
        (1, "mlp", {}),
        (3, "tied", {}),
        (3, "lora", {"node_cache": True}),
    ],
)
def test_training_stays_close_to_exact_training(comm, layout, stage, name, options):
    topology, gradients, weights = layout
    quantize = Quantize("int8" if stage == 3 else None, "int4", block=32)
    same = {"topology": topology, "steps": 5, "clip": 1.0, **options}
    exact, _ = partitioned_losses(comm, CASES[name], stage, **same)
    losses, _ = partitioned_losses(comm, CASES[name], stage, quantize=quantize, **same)
    assert losses == pytest.approx(exact, rel=0.02)
    # Sums of float32 have the same order: what is not sent is the same to the last bit.
    assert (losses != exact) == (gradients or (weights and stage == 3))


def test_all_ranks_see_the_same_weights_and_shards_stay_exact(comm, layout):
    topology, _, weights = layout
    model, optimizer = build(CASES["gpt"])
    exact = [p.detach().clone() for p in model.parameters()]
    with zerompi.partition(
        model, optimizer, comm=comm, topology=topology, node_cache=True, quantize=Quantize(block=32)
    ) as zero:
        kept = zero.full_state_dict()
        assert all(map(torch.equal, kept.values(), exact))
        step(comm, CASES["gpt"], model, optimizer)
        kept = zero.full_state_dict()
        with zero.gathered():
            seen = [p.detach().clone() for p in model.parameters()]
        with zero.gathered(writable=True):
            assert all(map(torch.equal, model.parameters(), kept.values()))
    everyone = comm.allgather(torch.cat([p.flatten() for p in seen]).numpy().tobytes())
    assert len(set(everyone)) == 1
    pairs = list(zip(seen, kept.values(), strict=True))
    largest = max(b.abs().max() for _, b in pairs)  # a block may begin in another parameter
    assert all((a - b).abs().max() <= largest / 250 for a, b in pairs)
    assert all(torch.equal(a, b) for a, b in pairs) == (not weights)


@pytest.mark.cover(1)
@pytest.mark.parametrize("pause", ["no_sync", "accumulate"])
def test_gradients_of_several_passes_are_quantized_once(comm, layout, pause):
    """Their buckets are not where the other ranks of the node can read them (no_sync)."""
    topology, *_ = layout
    gradients = []
    for quantize in (None, Quantize(None, "int8", block=32)):
        torch.manual_seed(0)
        model = nn.Sequential(*[nn.Linear(12, 12) for _ in range(5)])
        with zerompi.partition(
            model, comm=comm, topology=topology, stage=2, quantize=quantize
        ) as zero:
            inputs = torch.randn(3, 6, 12, generator=torch.Generator().manual_seed(comm.rank))
            if pause == "accumulate":
                with zero.accumulate(3):
                    for x in inputs:
                        model(x).square().mean().backward()
            else:
                with zero.no_sync():
                    for x in inputs[:2]:
                        model(x).square().mean().backward()
                model(inputs[2]).square().mean().backward()
            norm = float(zero.clip_grad_norm_(torch.inf))
            sent = by_label(zero._context.world.traffic.snapshot()).get("reduce_scatter", 0)
        gradients.append((norm, comm.allreduce(sent)))
    (exact, many), (norm, few) = gradients
    assert norm == pytest.approx(exact, rel=0.01)
    assert few <= many


def test_a_model_of_another_dtype_is_not_quantized(comm):
    losses = []
    for quantize in (None, Quantize(block=32)):
        torch.manual_seed(0)
        model = nn.Linear(12, 12).double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with zerompi.partition(
            model, optimizer, comm=comm, topology=one_each(comm), quantize=quantize
        ):
            for _ in range(2):
                loss = model(torch.ones(2, 12).double()).square().mean()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
    assert losses[0] == losses[1]


@pytest.mark.mpi(min_size=2)
def test_an_overflow_of_one_rank_skips_the_step_on_all(comm, layout):
    topology, *_ = layout
    model = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    precision = zerompi.MixedPrecision(torch.float16, output_dtype=torch.float32)
    quantize = Quantize(block=32, error_feedback=True)
    with zerompi.partition(
        model, optimizer, comm=comm, topology=topology, mixed_precision=precision, quantize=quantize
    ) as zero:
        before = zero.full_state_dict()
        for factor, skips in ((torch.inf, True), (1.0, False)):
            scale = zero.loss_scale
            loss = model(torch.ones(2, 12)).square().mean()
            (loss * (factor if comm.rank == comm.size - 1 else 1.0)).backward()
            optimizer.step()
            optimizer.zero_grad()
            assert zero.loss_scale == (scale / 2 if skips else scale)
            after = zero.full_state_dict()
            assert all(map(torch.equal, before.values(), after.values())) == skips
            assert all(value.isfinite().all() for value in after.values())


# -- bytes -------------------------------------------------------------------------------------


@pytest.mark.mpi(min_size=4)
@pytest.mark.parametrize("memory", ["1", "0"])
@pytest.mark.parametrize(
    ("options", "of_model"),
    [
        ({}, 3),
        ({"node_cache": True}, 2),
        ({"quantize": Quantize(block=64)}, 2 * 0.5 + 0.25 + 3 * 2 / 64),
        ({"node_cache": True, "quantize": Quantize(block=64)}, 0.5 + 0.25 + 2 * 2 / 64),
        ({"node_cache": True, "quantize": Quantize("int8", None, block=64)}, 0.5 + 2 / 64 + 1),
    ],
)
def test_bytes_between_nodes_are_those_of_the_paper(comm, monkeypatch, memory, options, of_model):
    """In units of the model's bytes at 16 bits; two of them for the scale of each block."""
    monkeypatch.setenv("ZEROMPI_SHARED_MEMORY", memory)
    model = nn.Sequential(*[nn.Linear(64, 63) if i % 2 else nn.Linear(63, 64) for i in range(4)])
    numel = sum(p.numel() for p in model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    precision = zerompi.MixedPrecision(torch.bfloat16, torch.bfloat16, torch.float32)
    topology = zerompi.Topology(comm, ranks_per_node=[2, comm.size - 2])
    units = list(model)  # numels that are no multiples of ranks and blocks
    with zerompi.partition(
        model,
        optimizer,
        comm=comm,
        topology=topology,
        mixed_precision=precision,
        units=units,
        **options,
    ) as zero:
        for _ in range(2):
            model(torch.ones(2, 63)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        traffic = zero.report().traffic
        sizes = zero.message_nbytes
    counted = [
        comm.allreduce(traffic[label]["inter_node"]) for label in ("all_gather", "reduce_scatter")
    ]
    gathers = 1 if "node_cache" in options else 2
    assert counted == [gathers * sizes.parameters, sizes.gradients]  # times (nodes - 1)
    # But for the last block of each shard.
    assert sum(counted) == pytest.approx(of_model * 2 * numel, rel=0.02)
    exact = options.get("quantize") is None
    assert (sum(counted) == of_model * 2 * numel) == exact


def test_all_ranks_together_send_what_the_partition_says(comm):
    model, optimizer = build(CASES["gpt"])
    with zerompi.partition(
        model, optimizer, comm=comm, topology=one_each(comm), quantize=Quantize()
    ) as zero:
        for _ in range(2):
            step(comm, CASES["gpt"], model, optimizer)
        traffic = by_label(zero.report().traffic)
        sizes = zero.message_nbytes
    times = comm.size - 1
    assert comm.allreduce(traffic.get("all_gather", 0)) == 2 * times * sizes.parameters
    assert comm.allreduce(traffic.get("reduce_scatter", 0)) == times * sizes.gradients


# -- error feedback ----------------------------------------------------------------------------


def test_error_feedback_is_counted_and_forgotten_with_the_weights(comm):
    buffers = {}
    for error_feedback in (False, True):
        model, optimizer = build(CASES["gpt"])
        quantize = Quantize(None, "int4", error_feedback=error_feedback)
        with zerompi.partition(
            model, optimizer, stage=2, comm=comm, topology=one_each(comm), quantize=quantize
        ) as zero:
            for number in range(2):
                step(comm, CASES["gpt"], model, optimizer, number)
            held = [zero.report().memory.now["buffers"]]
            zero.load_full_state_dict(zero.full_state_dict())
            held.append(zero.report().memory.now["buffers"])
        buffers[error_feedback] = held
    residuals = 4 * sum(p.numel() for p in GPT().parameters()) * (comm.size > 1)
    assert buffers[True][0] == buffers[False][0] + residuals
    assert buffers[True][1] == buffers[False][1] == buffers[False][0]


# -- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "quantize", "error", "message"),
    [
        (0, Quantize(None, "int4"), ValueError, "expected None at stage 0"),
        (2, Quantize(), ValueError, "expected weights=None at stage 2"),
        (3, "int8", TypeError, "quantize: expected zerompi.Quantize, got str"),
    ],
)
def test_what_cannot_be_quantized_is_refused(comm, stage, quantize, error, message):
    with pytest.raises(error, match=message):
        zerompi.partition(nn.Linear(3, 3), stage=stage, comm=comm, quantize=quantize)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"weights": "int2"}, ValueError, "weights: expected 'int8', 'int4' or None, got 'int2'"),
        ({"gradients": 4}, ValueError, "gradients: expected 'int8', 'int4' or None, got 4"),
        ({"weights": None, "gradients": None}, ValueError, "where gradients is None"),
        ({"block": 7}, ValueError, "block: expected a positive even number, got 7"),
        ({"block": 2.0}, TypeError, "block: expected an even number"),
        ({"gradients": None, "error_feedback": True}, ValueError, "error_feedback: expected False"),
        ({"error_feedback": 1}, TypeError, "error_feedback: expected True or False"),
    ],
)
def test_settings_that_cannot_work_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        Quantize(**arguments)


@pytest.mark.mpi(min_size=2)
def test_ranks_that_quantize_differently_are_told(comm):
    quantize = Quantize(block=32 if comm.rank == 0 else 64)
    with pytest.raises(zerompi.MismatchError, match=r"block=32.*rank [1-9].*block=64"):
        zerompi.partition(nn.Linear(3, 3), comm=comm, quantize=quantize)
