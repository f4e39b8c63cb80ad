"""Placeholders read as NaN, whatever has become of them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from zerompi.placeholder import Placeholder

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.complex64, torch.int64, torch.bool]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_was_written_into_it_is_gone_when_it_is_used_again(dtype):
    hidden = Placeholder(torch.zeros(3, 2), dtype)
    for _ in range(2):
        tensor = hidden.fresh()
        assert (tensor.shape, tensor.dtype) == ((3, 2), dtype)
        if dtype.is_floating_point or dtype.is_complex:
            assert tensor.isnan().all()
        else:
            assert not tensor.any()
        tensor.fill_(1)


def test_it_may_be_moved_into_shared_memory():
    parameter = nn.Parameter(torch.zeros(3))
    hidden = Placeholder(parameter, torch.float32)
    parameter.data = hidden.fresh()
    parameter.share_memory_()
    with torch.no_grad():
        parameter.fill_(1)
    parameter.data = hidden.fresh()
    assert parameter.isnan().all()
