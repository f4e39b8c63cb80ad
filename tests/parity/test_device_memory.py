"""Models in device memory beside those on the host: the same bits, and where what lies.

That they train like unsharded torch is seen with ZEROMPI_TEST_MEMORY=device: all other tests.
"""

from __future__ import annotations

import pytest
import torch

import zerompi
from harness.memory import HAS_DEVICE, WITHOUT_DEVICE, move
from models import CASES, build, own_slice
from zerompi import device
from zerompi.gradients import named

pytestmark = [pytest.mark.placed, pytest.mark.skipif(not HAS_DEVICE, reason=WITHOUT_DEVICE)]

STAGES = [0, 1, 2, 3]


def build_on_device(case, optimizer="adamw", seed=7):
    """The model of `build`, in device memory."""
    model, opt = build(case, optimizer, seed)
    move(model)
    return model, opt


def losses_of(comm, case, model, opt, zero, steps, *, clip=0.1):
    losses = []
    for step in range(steps):
        x, y = own_slice(case.batch(step), comm.rank, comm.size)
        loss = case.loss(model(x), y)
        loss.backward()
        zero.clip_grad_norm_(clip)
        opt.step()
        opt.zero_grad()
        losses.append(comm.allreduce(loss.item()) / comm.size)
    return losses


@pytest.mark.parametrize("stage", STAGES)
def test_the_bits_are_those_of_the_host(comm, stage):
    """On the host by messages, as on the device: the same layout, the same order of summation.

    Nothing is clipped: the norm is summed in float64 on a device, and differs in its last bits.
    """
    case = CASES["gpt"]
    precision = zerompi.MixedPrecision(torch.bfloat16, reduce_dtype=torch.bfloat16)
    results = []
    for make in (build, build_on_device):
        model, opt = make(case)
        with zerompi.partition(
            model, opt, stage=stage, comm=comm, mixed_precision=precision
        ) as zero:
            losses = losses_of(comm, case, model, opt, zero, 3, clip=torch.inf)
            results.append((losses, zero.full_state_dict()))
    (losses, state), (losses_on_device, state_on_device) = results
    assert losses == losses_on_device
    assert all(torch.equal(state[key], state_on_device[key]) for key in state)


@pytest.mark.parametrize("stage", STAGES)
def test_buffers_lie_where_the_parameters_lie(comm, stage):
    case = CASES["mlp"]
    model, opt = build_on_device(case)
    with zerompi.partition(model, opt, stage=stage, comm=comm) as zero:
        x, y = own_slice(case.batch(0), comm.rank, comm.size)
        case.loss(model(x), y).backward()
        for unit in zero._units:
            for segment in unit.segments:
                held = [segment.shard, segment.main, *(g for _, g in named([segment]))]
                assert all(device.holds(tensor) for tensor in held if tensor.numel())


def test_a_model_in_two_kinds_of_memory_is_refused(comm):
    model, _ = build_on_device(CASES["mlp"])
    model.layers[0].bias.data = model.layers[0].bias.detach().clone()
    with pytest.raises(ValueError, match="one kind of memory, got layers.0.bias on cpu"):
        zerompi.partition(model, comm=comm)


def test_a_checkpoint_goes_from_device_to_host_and_back(comm, tmp_path_factory):
    path = comm.bcast(str(tmp_path_factory.mktemp("device")) if comm.rank == 0 else None)
    case = CASES["gpt"]
    model, opt = build_on_device(case)
    with zerompi.partition(model, opt, comm=comm) as zero:
        losses_of(comm, case, model, opt, zero, 2)
        zero.save(f"{path}/a")
        expected = losses_of(comm, case, model, opt, zero, 2)
    for make in (build, build_on_device):
        model, opt = make(case, seed=3)
        with zerompi.partition(model, opt, comm=comm) as zero:
            zero.load(f"{path}/a")
            assert losses_of(comm, case, model, opt, zero, 2) == pytest.approx(expected, rel=1e-6)
