"""torch's Adam, stepped in parts that fit the cache: the same bits, and nothing else changes."""

from __future__ import annotations

import pytest
import torch
from torch.optim import SGD, Adam, AdamW

from zerompi import blocked_step

SIZES = ((1000, 37), (7,), (4111,))  # some larger than a part


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(blocked_step, "_PART_NUMEL", 1001)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)


def trained(kind, dtype, *, blocks, **options):
    """Weights and states after four steps, and the optimizer."""
    generator = torch.Generator().manual_seed(0)
    parameters = [
        torch.nn.Parameter(torch.randn(size, generator=generator).to(dtype)) for size in SIZES
    ]
    optimizer = kind(parameters, lr=1e-2, **options)
    undo = blocked_step.block(optimizer) if blocks else None
    for _ in range(4):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(dtype)
        optimizer.step()
    if undo is not None:
        undo()
    assert "_init_group" not in vars(optimizer)
    states = [value for p in parameters for value in optimizer.state[p].values()]
    return [p.detach() for p in parameters], states, optimizer


def counted(optimizer):
    """Into how many parts the parameters of a step are cut."""
    lists = [[], [], [], [], [], []]
    optimizer._init_group(optimizer.param_groups[0], *lists)
    return len(lists[0])


@pytest.mark.parametrize("kind", [Adam, AdamW])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [{}, {"amsgrad": True}, {"maximize": True, "weight_decay": 0.1}, {"fused": True}],
    ids=str,
)
def test_bits_are_torchs(kind, dtype, options):
    weights, states, _ = trained(kind, dtype, blocks=False, **options)
    own_weights, own_states, _ = trained(kind, dtype, blocks=True, **options)
    assert len(states) == len(own_states)
    for actual, expected in zip([*own_weights, *own_states], [*weights, *states], strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize(
    ("dtype", "options", "parts"),
    [
        (torch.float32, {}, 37 + 1 + 5),
        (torch.bfloat16, {}, 3),  # there bits may depend on where a part begins
        (torch.float32, {"foreach": True}, 3),
        (torch.float32, {"fused": True}, 3),
    ],
)
def test_large_parameters_are_cut(dtype, options, parts):
    *_, optimizer = trained(Adam, dtype, blocks=False, **options)
    undo = blocked_step.block(optimizer)
    assert counted(optimizer) == parts
    undo()
    assert counted(optimizer) == len(SIZES)


def test_optimizers_of_others_are_left_alone():
    class Mine(AdamW):
        pass

    for kind in (SGD, Mine):
        optimizer = kind([torch.nn.Parameter(torch.zeros(3))], lr=1.0)
        undo = blocked_step.block(optimizer)
        assert "_init_group" not in vars(optimizer)
        undo()


def test_own_way_of_an_optimizer_stays():
    optimizer = Adam([torch.nn.Parameter(torch.zeros(3))])
    own = optimizer._init_group = lambda *arguments: False
    blocked_step.block(optimizer)()
    assert optimizer._init_group is own


def test_parameters_that_count_their_steps_together_are_left_whole():
    _, _, optimizer = trained(Adam, torch.float32, blocks=False)
    first, *rest = optimizer.param_groups[0]["params"]
    for other in rest:
        optimizer.state[other]["step"] = optimizer.state[first]["step"]
    blocked_step.block(optimizer)
    assert counted(optimizer) == len(SIZES)
