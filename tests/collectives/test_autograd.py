"""Differentiable collectives: values, gradients and second derivatives, constants, refusals."""

from __future__ import annotations

import pytest
import torch

import zerompi
from collectives.samples import ALL_DTYPES, as_bytes, documented_sum, numbers, raw
from harness.memory import ON_DEVICE, apply_on_device, host_may_touch
from zerompi import autograd

N = 2  # elements along dim 0 of a block
# Every derivative is compared on the host. In a device's memory, where formulas are the same and each
# call takes long, sums of them are, with random factors.
FAST = ON_DEVICE


@pytest.fixture(autouse=True)
def _memory_under_test(monkeypatch):
    if not ON_DEVICE:
        yield
        return
    monkeypatch.setattr(autograd, "_apply", apply_on_device(autograd._apply))
    with host_may_touch(monkeypatch):
        yield


class Take(torch.autograd.Function):
    """Own row of a tensor that all ranks hold; the gradient is the rows' gradients of all ranks."""

    @staticmethod
    def forward(ctx, replicated, comm):
        ctx.comm = comm
        return replicated[comm.rank].clone()

    @staticmethod
    def backward(ctx, gradient):
        return Collect.apply(gradient, ctx.comm), None


class Collect(torch.autograd.Function):
    """The rows of all ranks on all ranks; the reverse of Take, independent of zerompi."""

    @staticmethod
    def forward(ctx, own, comm):
        ctx.comm = comm
        return torch.stack([torch.from_numpy(row) for row in comm.allgather(own.detach().numpy())])

    @staticmethod
    def backward(ctx, gradient):
        return Take.apply(gradient, ctx.comm), None


def operations(group):
    """Each differentiable collective, and the shape of a rank's tensor."""
    block, blocks = (N, 1), (N * group.size, 1)
    root = group.size - 1
    return {
        "all_gather": (lambda x: autograd.all_gather(x, group), block),
        "reduce_scatter": (lambda x: autograd.reduce_scatter(x, group), blocks),
        "reduce_scatter mean": (lambda x: autograd.reduce_scatter(x, group, "mean"), blocks),
        "all_reduce": (lambda x: autograd.all_reduce(x, group), block),
        "all_reduce mean": (lambda x: autograd.all_reduce(x, group, op="mean"), block),
        "all_reduce scalar": (lambda x: autograd.all_reduce(x.sum(), group), block),
        "all_to_all": (lambda x: autograd.all_to_all(x, group), blocks),
        "broadcast": (lambda x: autograd.broadcast(x, group, root), block),
    }


NAMES = [
    "all_gather",
    "reduce_scatter",
    "reduce_scatter mean",
    "all_reduce",
    "all_reduce mean",
    "all_reduce scalar",
    "all_to_all",
    "broadcast",
]


def replicated_function(group, name, *, linear):
    """The collective as a function of the tensors of all ranks, and a point to differentiate at."""
    operation, shape = operations(group)[name]

    def function(replicated):
        own = Take.apply(replicated, group.comm)
        result = operation(own) if linear else operation(own.sin()) ** 2 * own.sum()
        return Collect.apply(result, group.comm)

    generator = torch.Generator().manual_seed(3)
    point = torch.randn(group.size, *shape, dtype=torch.float64, generator=generator)
    return function, point.requires_grad_()


@pytest.mark.parametrize("linear", [True, False], ids=["linear", "composed"])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_equal_finite_differences(flat, name, linear):
    function, point = replicated_function(flat, name, linear=linear)
    assert torch.autograd.gradcheck(function, point, fast_mode=FAST)


@pytest.mark.parametrize("linear", [True, False], ids=["linear", "composed"])
@pytest.mark.parametrize("name", NAMES)
def test_second_derivatives_equal_finite_differences(flat, name, linear):
    function, point = replicated_function(flat, name, linear=linear)
    generator = torch.Generator().manual_seed(5)
    weights = torch.randn(function(point).shape, dtype=torch.float64, generator=generator)
    assert torch.autograd.gradgradcheck(
        function, point, weights.requires_grad_(), fast_mode=FAST or not linear
    )


@pytest.mark.cover(1)  # the collectives themselves are tested on every layout
@pytest.mark.parametrize("name", NAMES)
def test_gradients_on_every_layout_of_nodes(group, name):
    function, point = replicated_function(group, name, linear=False)
    assert torch.autograd.gradcheck(function, point, fast_mode=True)


def test_results_have_every_bit_of_every_dtype(flat):
    block = slice(2 * flat.rank, 2 * flat.rank + 2)
    for dtype in ALL_DTYPES:
        own = raw(dtype, 2 * flat.size, flat.rank)
        everyone = [raw(dtype, 2 * flat.size, rank) for rank in range(flat.size)]
        gathered = autograd.all_gather(own, flat)
        assert as_bytes(gathered) == b"".join(map(as_bytes, everyone)), dtype
        swapped = autograd.all_to_all(own, flat)
        assert as_bytes(swapped) == b"".join(as_bytes(part[block]) for part in everyone), dtype
        assert as_bytes(autograd.broadcast(own, flat)) == as_bytes(everyone[0]), dtype
        assert as_bytes(own) == as_bytes(everyone[flat.rank]), dtype


@pytest.mark.cover(1)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.complex64, torch.int32])
def test_sums_are_those_of_the_collectives(group, dtype):
    everyone = [numbers(dtype, 2 * group.size, rank) for rank in range(group.size)]
    own, expected = everyone[group.rank], documented_sum(everyone, group)
    assert torch.equal(autograd.all_reduce(own, group), expected)
    block = slice(2 * group.rank, 2 * group.rank + 2)
    assert torch.equal(autograd.reduce_scatter(own, group), expected[block])
    assert torch.equal(own, numbers(dtype, 2 * group.size, group.rank))


def test_shapes_keep_all_but_the_first_dimension(flat):
    size = flat.size
    assert autograd.all_gather(torch.zeros(3, 4, 5), flat).shape == (3 * size, 4, 5)
    assert autograd.reduce_scatter(torch.zeros(3 * size, 4), flat).shape == (3, 4)
    assert autograd.all_to_all(torch.zeros(3 * size, 4), flat).shape == (3 * size, 4)
    assert autograd.all_reduce(torch.zeros(()), flat).shape == ()
    assert autograd.broadcast(torch.zeros(2, 0, 3), flat).shape == (2, 0, 3)


def test_the_scalar_is_the_sum_of_all_losses(flat):
    x = torch.ones(2, requires_grad=True)
    weight = flat.rank + 1.0
    (weight * autograd.all_gather(x, flat)).sum().backward()
    assert x.grad.tolist() == [sum(range(flat.size + 1))] * 2


def test_only_the_root_has_a_gradient_of_a_broadcast(flat):
    x = torch.ones(3, requires_grad=True)
    autograd.broadcast(x, flat).sum().backward()
    assert x.grad.tolist() == [flat.size if flat.rank == 0 else 0.0] * 3


def test_a_constant_on_other_ranks_takes_part_in_backward(flat):
    x = torch.ones(3, requires_grad=flat.rank == 0)
    result = autograd.broadcast(x, flat)
    assert result.requires_grad
    (result * (flat.rank + 1)).sum().backward()
    if flat.rank == 0:
        assert x.grad.tolist() == [sum(range(flat.size + 1))] * 3
    else:
        assert x.grad is None


def test_constants_everywhere_give_constants(flat):
    assert not autograd.all_reduce(torch.ones(3), flat).requires_grad


def test_no_gradients_are_recorded_under_no_grad(flat):
    x = torch.ones(3, requires_grad=True)
    with torch.no_grad():
        assert not autograd.all_reduce(x, flat).requires_grad


def test_tensors_that_are_not_contiguous_are_copied(flat):
    x = torch.arange(6.0).view(2, 3).requires_grad_()
    result = autograd.all_gather(x.t(), flat)
    assert torch.equal(result, torch.cat([x.t()] * flat.size))
    (result * torch.arange(3.0 * flat.size)[:, None]).sum().backward()
    own = torch.stack([torch.arange(3.0) + 3 * rank for rank in range(flat.size)])
    expected = own[flat.rank] * flat.size
    assert torch.equal(x.grad, expected.expand(2, 3))


def test_lazy_conjugates_are_resolved(flat):
    x = torch.tensor([1 + 2j, 3j], requires_grad=True)
    result = autograd.all_reduce(x.conj(), flat)
    assert torch.equal(result, flat.size * x.detach().conj())
    result.imag.sum().backward()
    assert torch.equal(x.grad, torch.tensor([-1j, -1j]) * flat.size)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_in_narrow_dtypes_accumulate_in_float32(flat, dtype):
    if flat.size < 3:
        pytest.skip("needs 3 summands")
    half_eps = torch.finfo(dtype).eps / 2
    x = torch.zeros(1, dtype=dtype, requires_grad=True)
    weight = torch.full((flat.size,), 1.0 if flat.rank == 0 else half_eps, dtype=dtype)
    (autograd.all_gather(x, flat) * weight).sum().backward()
    assert x.grad.item() == torch.tensor(1.0 + (flat.size - 1) * half_eps).to(dtype).item() != 1.0


def test_gradients_of_nothing(flat):
    x = torch.empty(0, 3, requires_grad=True)
    autograd.all_gather(x, flat).sum().backward()
    assert x.grad.shape == (0, 3)


def test_a_rank_that_skips_a_backward_is_found_at_the_next_collective(flat):
    if flat.size == 1:
        pytest.skip("needs another rank")
    x = torch.ones(2, requires_grad=True)
    result = autograd.all_gather(x, flat)
    skips = flat.rank == 0
    loss = x.sum() if skips else result.sum()
    if skips:
        loss.backward()
    proceed = (lambda: flat.agree("the next step")) if skips else loss.backward
    with pytest.raises(zerompi.MismatchError, match=r"rank 0: the next step; .*reduce_scatter"):
        proceed()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda g: autograd.all_gather(3.0, g), TypeError, "tensor: expected a torch tensor"),
        (lambda g: autograd.all_gather(torch.ones(()), g), ValueError, "at least one dimension"),
        (lambda g: autograd.all_to_all(torch.ones(()), g), ValueError, "at least one dimension"),
        (
            lambda g: autograd.all_reduce(torch.ones(2, device="meta"), g),
            ValueError,
            "tensor: expected a tensor on cpu or cuda",
        ),
        (
            lambda g: autograd.broadcast(torch.ones(2).to_sparse(), g),
            ValueError,
            "tensor: expected a dense tensor",
        ),
        (lambda g: autograd.all_reduce(torch.ones(2), g, "max"), ValueError, "op: expected 'sum'"),
        (
            lambda g: autograd.all_reduce(torch.ones(2).int(), g, "mean"),
            TypeError,
            "op: expected 'sum' for torch.int32",
        ),
        (lambda g: autograd.broadcast(torch.ones(2), g, 77), ValueError, "root: expected a rank"),
        (lambda g: autograd.all_reduce(torch.ones(2), "x"), TypeError, "group: expected"),
    ],
)
def test_wrong_arguments_are_refused(flat, call, error, message):
    with pytest.raises(error, match=message):
        call(flat)


def test_blocks_that_do_not_divide_are_refused(flat):
    if flat.size == 1:
        pytest.skip("one divides everything")
    x = torch.ones(flat.size + 1)
    for operation in (autograd.reduce_scatter, autograd.all_to_all):
        with pytest.raises(ValueError, match=f"tensor: expected a multiple of {flat.size} along"):
            operation(x, flat)


@pytest.mark.parametrize("difference", ["shape", "gradients", "dtype"])
def test_ranks_that_disagree_all_hear_of_both(flat, difference):
    if flat.size == 1:
        pytest.skip("needs ranks that disagree")
    last = flat.rank == flat.size - 1
    shape = (3, 2) if last and difference == "shape" else (2, 3)
    x = torch.ones(shape, dtype=torch.float64 if last and difference == "dtype" else None)
    sides = {
        "shape": r"shape=\(2, 3\).*shape=\(3, 2\)",
        "gradients": "gradients=recorded.*gradients=not recorded",
        "dtype": "float32.*float64",
    }
    with (
        torch.set_grad_enabled(not (last and difference == "gradients")),
        pytest.raises(zerompi.MismatchError, match=sides[difference]),
    ):
        autograd.all_reduce(x, flat)
