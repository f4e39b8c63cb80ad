"""The norm of a gradient on the host: as exact when it is long, and finite where its values are."""

from __future__ import annotations

import math

import pytest
import torch

from zerompi.gradient_norms import norm

NUMEL = 1_000_001  # many rows, the last one short


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, math.inf])
def test_a_long_gradient_has_the_norm_of_its_values(dtype, norm_type):
    torch.manual_seed(0)
    gradient = torch.rand(NUMEL).to(dtype)
    exact = torch.linalg.vector_norm(gradient.double(), norm_type).item()
    assert norm(gradient, norm_type) == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("numel", [1, 4096, 5000])
def test_large_values_do_not_overflow(numel):
    assert norm(torch.full((numel,), 1e30), 2.0) == pytest.approx(1e30 * numel**0.5)


@pytest.mark.parametrize("norm_type", [1.0, 2.0, math.inf])
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_it_is_not_finite_if_a_value_is_not(norm_type, bad):
    gradient = torch.ones(5000)
    gradient[4999] = bad
    found = norm(gradient, norm_type)
    assert math.isnan(found) if math.isnan(bad) else found == bad
