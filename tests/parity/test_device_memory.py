"""Models whose parameters lie in device memory train like those on the host.

The memory is such that the host can address it, as an emulated device's is: torch computes on the
host, and zerompi has the buffers on the device. Where the device's pages are protected they are open
while torch computes, and closed while messages are sent.
"""

from __future__ import annotations

import pytest
import torch

import zerompi
from harness.memory import HAS_DEVICE, WITHOUT_DEVICE, DeviceMemory, host_may_touch, synchronise
from models import CASES, assert_same_weights, build, own_slice, unsharded_losses
from zerompi import device

pytestmark = pytest.mark.skipif(not HAS_DEVICE, reason=WITHOUT_DEVICE)

STAGES = [0, 1, 2, 3]


@pytest.fixture(autouse=True)
def _open_pages(monkeypatch):
    with host_may_touch(monkeypatch):
        yield


def build_on_device(case, optimizer="adamw", seed=7):
    """The model of `build` with its parameters in device memory."""
    model, opt = build(case, optimizer, seed)
    for parameter in model.parameters():
        parameter.data = DeviceMemory().put_tensor(parameter.detach())
    synchronise()
    return model, opt


def losses_of(comm, case, model, opt, zero, steps):
    losses = []
    for step in range(steps):
        x, y = own_slice(case.batch(step), comm.rank, comm.size)
        loss = case.loss(model(x), y)
        loss.backward()
        zero.clip_grad_norm_(0.1)
        opt.step()
        opt.zero_grad()
        losses.append(comm.allreduce(loss.item()) / comm.size)
    return losses


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", ["gpt", "mlp", "cnn"])
def test_losses_equal_unsharded_torch(comm, name, stage):
    case, steps = CASES[name], 5
    expected, reference = unsharded_losses(case, steps=steps, clip=0.1)
    model, opt = build_on_device(case, seed=7 if comm.rank == 0 else 70 + comm.rank)
    with zerompi.partition(model, opt, stage=stage, comm=comm) as zero:
        losses = losses_of(comm, case, model, opt, zero, steps)
        state = zero.full_state_dict()
    assert losses == pytest.approx(expected, rel=1e-5)
    assert_same_weights(state, reference, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("stage", STAGES)
def test_the_bits_are_those_of_the_host(comm, stage):
    """On the host by messages, as on the device: the same layout, the same order of summation."""
    case = CASES["gpt"]
    precision = zerompi.MixedPrecision(torch.bfloat16, reduce_dtype=torch.bfloat16)
    results = []
    for make in (build, build_on_device):
        model, opt = make(case)
        with zerompi.partition(
            model, opt, stage=stage, comm=comm, mixed_precision=precision
        ) as zero:
            losses = losses_of(comm, case, model, opt, zero, 3)
            results.append((losses, zero.full_state_dict()))
    (losses, state), (losses_on_device, state_on_device) = results
    assert losses == losses_on_device
    assert all(torch.equal(state[key], state_on_device[key]) for key in state)


@pytest.mark.parametrize("nodes", ["2+2", "1+1"])
@pytest.mark.parametrize("stage", [2, 3])
def test_losses_equal_unsharded_torch_on_faked_nodes(comm, nodes, stage):
    sizes = [int(n) for n in nodes.split("+")]
    if sum(sizes) != comm.size:
        pytest.skip(f"{nodes} needs {sum(sizes)} ranks")
    topology, case = zerompi.Topology(comm, ranks_per_node=sizes), CASES["gpt"]
    expected, _ = unsharded_losses(case, steps=4, clip=0.1)
    model, opt = build_on_device(case)
    options = {"topology": topology, "node_cache": stage == 3}
    with zerompi.partition(model, opt, stage=stage, comm=comm, **options) as zero:
        losses = losses_of(comm, case, model, opt, zero, 4)
    assert losses == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_buffers_lie_where_the_parameters_lie(comm, stage):
    case = CASES["mlp"]
    model, opt = build_on_device(case)
    with zerompi.partition(model, opt, stage=stage, comm=comm) as zero:
        x, y = own_slice(case.batch(0), comm.rank, comm.size)
        case.loss(model(x), y).backward()
        for unit in zero._units:
            for segment in unit.segments:
                held = [segment.shard, segment.main, *segment.gradients.values()]
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
