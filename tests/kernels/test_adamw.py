"""AdamW on a flat shard, on the host: it steps as torch's does."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from kernels.samples import DTYPES, as_dtype, as_float32, assert_same_bits
from zerompi.kernels.adamw import Hyperparameters, Shard, adamw

N = 20_000  # more than is worked on at a time
STEPS = 5


def shard_of(seed, gradient="float32", parameters=None):
    rng = np.random.default_rng(seed)
    weights, values = rng.standard_normal((2, N)).astype(np.float32)
    return Shard(
        weights,
        as_dtype(values, gradient),
        np.zeros(N, np.float32),
        np.zeros(N, np.float32),
        None if parameters is None else np.zeros(N, DTYPES[parameters]),
    )


@pytest.mark.parametrize("gradient", DTYPES)
@pytest.mark.parametrize(
    "hyper",
    [
        Hyperparameters(),
        Hyperparameters(lr=0.1, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.0),
        Hyperparameters(lr=0.5, betas=(0.2, 0.5), eps=1e-3, weight_decay=0.1),
    ],
)
def test_steps_agree_with_torch_but_for_rounding(hyper, gradient):
    factor = 0.37
    shard = shard_of(0)
    parameter = torch.nn.Parameter(torch.from_numpy(shard.weights.copy()))
    optimizer = torch.optim.AdamW([parameter], **dataclasses.asdict(hyper))
    rng = np.random.default_rng(1)
    for step in range(1, STEPS + 1):
        values = as_dtype(rng.standard_normal(N).astype(np.float32), gradient)
        parameter.grad = torch.from_numpy(as_float32(values) * np.float32(factor))
        optimizer.step()
        adamw(dataclasses.replace(shard, gradient=values), hyper, step, factor)
    state = optimizer.state[parameter]
    ulp = 2.0**-23
    for actual, expected in [
        (shard.weights, parameter.detach()),
        (shard.exp_avg, state["exp_avg"]),
        (shard.exp_avg_sq, state["exp_avg_sq"]),
    ]:
        difference = np.abs(actual.astype(np.float64) - expected.numpy())
        # What is rounded are sums whose terms are up to a few units, once or twice a step.
        assert difference.max() <= 4 * STEPS * ulp * max(1, np.abs(actual).max())
        assert np.abs(actual).max() > 0


@pytest.mark.parametrize("parameters", ["float16", "bfloat16"])
def test_narrow_parameters_are_the_rounded_weights(parameters):
    shard = shard_of(2, parameters=parameters)
    adamw(shard, Hyperparameters(), 1)
    assert_same_bits(shard.parameters, as_dtype(shard.weights, parameters))


def test_a_factor_counts_as_if_the_gradient_were_multiplied():
    scaled, plain = shard_of(3), shard_of(3)
    plain = dataclasses.replace(plain, gradient=plain.gradient * np.float32(0.1))
    adamw(scaled, Hyperparameters(), 1, factor=0.1)
    adamw(plain, Hyperparameters(), 1)
    assert_same_bits(scaled.weights, plain.weights)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"exp_avg": np.zeros(3, np.float32)}, ValueError, "exp_avg: expected shape"),
        ({"exp_avg_sq": np.zeros(N, np.float16)}, TypeError, "exp_avg_sq: expected float32"),
        ({"gradient": np.zeros(N)}, TypeError, "gradient: expected float32, float16 or uint16"),
        ({"parameters": np.zeros(N, np.float32)}, TypeError, "parameters: expected float16 or"),
        (
            {"gradient": np.zeros(N, np.float16), "parameters": np.zeros(N, np.uint16)},
            TypeError,
            "parameters: expected float16, got uint16",
        ),
    ],
)
def test_arrays_that_do_not_belong_together_are_refused(change, error, message):
    with pytest.raises(error, match=message):
        dataclasses.replace(shard_of(4), **change)
