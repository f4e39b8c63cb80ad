"""`zerompi.AdamW` steps as `torch.optim.AdamW` does, on the host and on a device."""

from __future__ import annotations

import importlib

import pytest
import torch

import zerompi
from harness.memory import HAS_DEVICE, WITHOUT_DEVICE
from models import CASES, build
from test_device_memory import build_on_device, losses_of
from zerompi import adamw, blocked_step, device

pytestmark = pytest.mark.placed
on_device = pytest.mark.skipif(not HAS_DEVICE, reason=WITHOUT_DEVICE)
PLACES = [
    pytest.param(build, id="host"),
    pytest.param(build_on_device, id="device", marks=on_device),
]


def made(make, kind, seed=7, **options):
    """A model whose parameters are in two param groups of this optimizer."""
    model, _ = make(CASES["gpt"], seed=seed)
    wide = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": wide, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    return model, kind(groups, lr=1e-2, betas=(0.9, 0.95), **options)


def states_of(opt):
    return [
        {key: torch.as_tensor(value).clone() for key, value in opt.state[p].items()}
        for group in opt.param_groups
        for p in group["params"]
    ]


def assert_alike(actual, expected):
    # The operations and their order are torch's; it may multiply and add in one rounding, and the
    # gradients of later steps are those of weights that differ by as much.
    assert list(actual) == list(expected)
    for key in expected:
        torch.testing.assert_close(actual[key], expected[key], rtol=1e-4, atol=1e-6)


@pytest.mark.cover
@pytest.mark.parametrize("make", PLACES)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("options", [{}, {"amsgrad": True}], ids=["plain", "amsgrad"])
def test_steps_are_those_of_torch(comm, make, stage, options):
    results = []
    for kind in (torch.optim.AdamW, zerompi.AdamW):
        model, opt = made(make, kind, **options)
        with zerompi.partition(model, opt, stage=stage, comm=comm) as zero:
            losses = losses_of(comm, CASES["gpt"], model, opt, zero, 4)
            results.append((losses, zero.full_state_dict(), states_of(opt)))
    (expected, weights, states), (losses, own_weights, own_states) = results
    assert losses == pytest.approx(expected, rel=1e-5)
    assert_alike(own_weights, weights)
    for own, of_torch in zip(own_states, states, strict=True):
        assert_alike(own, of_torch)


@pytest.fixture
def numbers_stepped(monkeypatch):
    """Of each call of torch's function: how many tensors it has stepped, and the largest of them."""
    module = importlib.import_module("torch.optim.adam")
    function, calls = module.adam, []

    def adam(parameters, *args, **kwargs):
        calls.append((len(parameters), max((p.numel() for p in parameters), default=0)))
        return function(parameters, *args, **kwargs)

    monkeypatch.setattr(module, "adam", adam)
    return calls


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW, zerompi.AdamW])
def test_steps_in_parts_have_the_same_bits(comm, stage, kind, monkeypatch, numbers_stepped):
    results, calls = [], []
    few = max(1, 16 // torch.get_num_threads())  # for each thread
    for numel in (1 << 30, few):
        monkeypatch.setattr(blocked_step, "_PART_NUMEL", numel)
        model, opt = made(build, kind)
        with zerompi.partition(model, opt, stage=stage, comm=comm) as zero:
            losses = losses_of(comm, CASES["gpt"], model, opt, zero, 3)
            results.append((losses, zero.full_state_dict(), states_of(opt)))
        assert "_init_group" not in vars(opt)
        calls.append(list(numbers_stepped))
        numbers_stepped.clear()
    (expected, weights, states), (losses, own_weights, own_states) = results
    (num_pieces, largest), (num_parts, largest_part) = map(max, calls)
    assert num_parts > num_pieces
    assert largest > few * torch.get_num_threads() >= largest_part
    assert losses == expected
    for own, other in zip([own_weights, *own_states], [weights, *states], strict=True):
        assert all(torch.equal(own[key], other[key]) for key in other)


@on_device
@pytest.mark.parametrize("reduce_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("stage", [0, 3])
def test_device_memory_is_stepped_by_few_launches(comm, stage, reduce_dtype, monkeypatch):
    launches = []
    launch = adamw.launch_adamw
    monkeypatch.setattr(
        adamw, "launch_adamw", lambda *args: launches.append(len(args)) or launch(*args)
    )
    model, _ = build_on_device(CASES["gpt"])
    opt = zerompi.AdamW(model.parameters())
    precision = zerompi.MixedPrecision(reduce_dtype, reduce_dtype)
    with zerompi.partition(model, opt, stage=stage, comm=comm, mixed_precision=precision) as zero:
        losses_of(comm, CASES["gpt"], model, opt, zero, 2)
        segments = sum(len(unit.trainable) for unit in zero._units)
        held = [state["exp_avg"] for state in opt.state.values() if state["exp_avg"].numel()]
        assert all(map(device.holds, held))
    assert 0 < len(launches) <= 2 * segments


@pytest.mark.parametrize("make", PLACES)
@pytest.mark.parametrize(
    "kinds", [(torch.optim.AdamW, zerompi.AdamW), (zerompi.AdamW, torch.optim.AdamW)]
)
def test_a_checkpoint_goes_from_one_to_the_other(comm, make, kinds, tmp_path_factory):
    path = comm.bcast(str(tmp_path_factory.mktemp("adamw")) if comm.rank == 0 else None)
    case = CASES["gpt"]
    model, opt = made(make, kinds[0])
    with zerompi.partition(model, opt, comm=comm) as zero:
        losses_of(comm, case, model, opt, zero, 2)
        zero.save(f"{path}/a")
        expected = losses_of(comm, case, model, opt, zero, 2)
    model, opt = made(make, kinds[1], seed=3)
    with zerompi.partition(model, opt, comm=comm) as zero:
        zero.load(f"{path}/a")
        assert losses_of(comm, case, model, opt, zero, 2) == pytest.approx(expected, rel=1e-5)
