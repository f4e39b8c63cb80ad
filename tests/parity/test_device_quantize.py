"""Quantized training of models in device memory: the bits of the host, the bytes of the theory."""

from __future__ import annotations

import pytest
import torch
from mpi4py import MPI

import zerompi
from harness.memory import HAS_DEVICE, WITHOUT_DEVICE
from models import CASES, build, one_each
from test_device_memory import build_on_device, losses_of
from zerompi import Quantize, device

pytestmark = [pytest.mark.placed, pytest.mark.skipif(not HAS_DEVICE, reason=WITHOUT_DEVICE)]


def topology_of(comm, layout):
    if layout == "one each":
        return one_each(comm)
    sizes = [comm.size] if layout == "one node" else [int(n) for n in layout.split("+")]
    return zerompi.Topology(comm, ranks_per_node=sizes)


def by_messages(zero):
    """Whether the ranks of a node send each other what lies on a device."""
    return zero._context.shard_group.transport().node is None


@pytest.mark.parametrize(
    "layout", ["one node", "one each", "2+2", "3+1"][: 4 if MPI.COMM_WORLD.size == 4 else 2]
)
@pytest.mark.parametrize(
    ("stage", "quantize", "precision"),
    [
        (1, Quantize(None, "int4", block=32), None),
        (2, Quantize(None, "int4", block=32, error_feedback=True), None),
        (3, Quantize(block=32), zerompi.MixedPrecision(torch.bfloat16, torch.bfloat16)),
        (3, Quantize(block=32, error_feedback=True), zerompi.MixedPrecision(torch.float16)),
    ],
    ids=["1", "2 feedback", "3 bfloat16", "3 float16 feedback"],
)
def test_training_has_the_bits_and_bytes_of_the_host(
    comm, layout, stage, quantize, precision, monkeypatch
):
    case, results = CASES["gpt"], []
    options = {
        "stage": stage,
        "topology": topology_of(comm, layout),
        "quantize": quantize,
        "mixed_precision": precision,
    }
    for make in (build_on_device, build):
        model, opt = make(case)
        with zerompi.partition(model, opt, comm=comm, **options) as zero:
            losses = losses_of(comm, case, model, opt, zero, 3, clip=torch.inf)
            sent = zero.report().traffic
            results.append((losses, zero.full_state_dict(), sent))
            if make is build_on_device and by_messages(zero):
                monkeypatch.setenv("ZEROMPI_SHARED_MEMORY", "0")
            shares = zero._context.shard_group.node is not None
    (losses, state, sent), (on_host, state_on_host, sent_on_host) = results
    if layout == "one node" and stage == 3 and shares:
        # There is one copy on the host; on devices each rank has one, and gathers are quantized.
        assert losses == pytest.approx(on_host, rel=0.02)
        return
    assert losses == on_host
    assert all(torch.equal(state[key], state_on_host[key]) for key in state)
    for label in ("all_gather", "reduce_scatter"):
        between = [of.get(label, {}).get("inter_node", 0) for of in (sent, sent_on_host)]
        assert between[0] == between[1]


@pytest.mark.mpi(min_size=4)
@pytest.mark.parametrize("node_cache", [False, True])
def test_bytes_between_nodes_are_those_of_the_theory(comm, node_cache):
    topology = zerompi.Topology(comm, ranks_per_node=[2, comm.size - 2])
    case = CASES["gpt"]
    model, opt = build_on_device(case)
    options = {"topology": topology, "node_cache": node_cache, "quantize": Quantize(block=64)}
    with zerompi.partition(model, opt, comm=comm, **options) as zero:
        losses_of(comm, case, model, opt, zero, 2)
        traffic, sizes = zero.report().traffic, zero.message_nbytes
    counted = [
        comm.allreduce(traffic[label]["inter_node"]) for label in ("all_gather", "reduce_scatter")
    ]
    assert counted == [(1 if node_cache else 2) * sizes.parameters, sizes.gradients]


def test_what_error_feedback_keeps_lies_on_the_device(comm):
    case = CASES["mlp"]
    model, opt = build_on_device(case)
    quantize = Quantize(None, "int4", error_feedback=True)
    with zerompi.partition(
        model, opt, stage=2, comm=comm, topology=one_each(comm), quantize=quantize
    ) as zero:
        losses_of(comm, case, model, opt, zero, 2)
        kept = [
            residual
            for unit in zero._units
            for gradients in unit.gradients
            for residual in gradients.packer._residuals.values()
        ]
        assert bool(kept) == (comm.size > 1)
        assert all(device.as_cupy(residual).nbytes == residual.nbytes for residual in kept)
        assert not any(isinstance(residual, torch.Tensor) for residual in kept)
