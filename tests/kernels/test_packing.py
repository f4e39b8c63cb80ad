"""Arrays into a flat buffer and back, on the host."""

from __future__ import annotations

import numpy as np
import pytest

from kernels.samples import assert_same_bits
from zerompi.kernels import packing


def test_arrays_go_to_their_offsets_and_come_back():
    arrays = [np.arange(6.0).reshape(2, 3), np.array(7.0), np.empty((0, 4)), np.arange(2.0) + 8]
    offsets = [3, 0, 9, 10]
    flat = np.full(14, -1.0)
    packing.pack(arrays, offsets, flat)
    assert flat.tolist() == [7, -1, -1, 0, 1, 2, 3, 4, 5, -1, 8, 9, -1, -1]
    back = [np.full_like(array, np.nan) for array in arrays]
    packing.unpack(flat, back, offsets)
    for array, expected in zip(back, arrays, strict=True):
        assert_same_bits(array, expected)


@pytest.mark.parametrize(
    ("arrays", "offsets", "flat", "error", "message"),
    [
        ([np.ones(3)], [2], np.ones(4), ValueError, r"offsets\[0\]: expected 3 elements inside"),
        ([np.ones(3)], [-1], np.ones(4), ValueError, r"offsets\[0\]: expected 3 elements inside"),
        ([np.ones(3)], [0, 1], np.ones(4), ValueError, "offsets: expected 1, got 2"),
        ([np.ones(3, "f4")], [0], np.ones(4), TypeError, r"arrays\[0\]: expected float64"),
        ([np.ones(6)[::2]], [0], np.ones(4), ValueError, r"arrays\[0\]: expected a contiguous"),
        ([np.ones(3)], [0], np.ones((2, 2)), ValueError, "flat: expected a contiguous 1-D array"),
    ],
)
def test_what_does_not_fit_is_refused(arrays, offsets, flat, error, message):
    with pytest.raises(error, match=message):
        packing.pack(arrays, offsets, flat)
    with pytest.raises(error, match=message):
        packing.unpack(flat, arrays, offsets)
