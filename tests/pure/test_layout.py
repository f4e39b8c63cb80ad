"""The flat layout: who owns which elements."""

from __future__ import annotations

from math import prod

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zerompi.layout import FlatLayout, Range

shapes = st.lists(st.lists(st.integers(0, 5), max_size=3).map(tuple), max_size=8)
shards = st.integers(1, 9)


def elements(ranges):
    return [element for start, stop in ranges for element in range(start, stop)]


@given(shapes, shards)
def test_shards_own_every_element_once_and_in_order(shapes, num_shards):
    layout = FlatLayout(shapes, num_shards)
    assert elements(layout.shard_ranges) == list(range(layout.numel))


@given(shapes, shards)
def test_parameters_follow_one_another(shapes, num_shards):
    layout = FlatLayout(shapes, num_shards)
    assert [r.numel for r in layout.parameter_ranges] == [prod(shape) for shape in shapes]
    assert elements(layout.parameter_ranges) == list(range(layout.numel))


@given(shapes, shards)
def test_padding_is_less_than_one_element_per_shard(shapes, num_shards):
    layout = FlatLayout(shapes, num_shards)
    assert 0 <= layout.padded_numel - layout.numel < num_shards
    assert layout.padded_numel == layout.shard_numel * num_shards
    assert all(own.numel <= layout.shard_numel for own in layout.shard_ranges)


@given(shapes, shards)
def test_a_shard_begins_at_its_multiple_unless_it_is_empty(shapes, num_shards):
    layout = FlatLayout(shapes, num_shards)
    for index, own in enumerate(layout.shard_ranges):
        assert own.numel == 0 or own.start == index * layout.shard_numel


@given(shapes, shards)
def test_pieces_reassemble_every_parameter(shapes, num_shards):
    layout = FlatLayout(shapes, num_shards)
    for parameter, whole in enumerate(layout.parameter_ranges):
        pieces = [layout.piece(parameter, shard) for shard in range(num_shards)]
        assert elements(p.in_parameter for p in pieces) == list(range(whole.numel))
        assert elements(p.in_flat for p in pieces) == list(range(*whole))


@given(shapes, shards)
def test_pieces_fill_every_shard(shapes, num_shards):
    layout = FlatLayout(shapes, num_shards)
    for shard, own in enumerate(layout.shard_ranges):
        pieces = [layout.piece(parameter, shard) for parameter in range(len(shapes))]
        assert elements(p.in_shard for p in pieces) == list(range(own.numel))
        assert elements(p.in_flat for p in pieces) == list(range(*own))


@given(shapes, shards)
def test_the_three_ranges_of_a_piece_are_the_same_elements(shapes, num_shards):
    layout = FlatLayout(shapes, num_shards)
    for parameter, whole in enumerate(layout.parameter_ranges):
        for shard in range(num_shards):
            piece = layout.piece(parameter, shard)
            assert piece.in_parameter.numel == piece.in_shard.numel == piece.in_flat.numel
            if piece.in_flat.numel:
                assert piece.in_flat.start == whole.start + piece.in_parameter.start
                assert piece.in_flat.start == shard * layout.shard_numel + piece.in_shard.start


def test_the_example_of_the_documentation():
    layout = FlatLayout([(5,), (2, 3)], 4)
    assert (layout.numel, layout.shard_numel, layout.padded_numel) == (11, 3, 12)
    assert layout.shard_ranges == ((0, 3), (3, 6), (6, 9), (9, 11))
    assert layout.piece(0, 1).in_parameter == Range(3, 5)
    assert layout.piece(1, 1) == (Range(0, 1), Range(2, 3), Range(5, 6))


def test_an_empty_layout_has_empty_shards():
    layout = FlatLayout([], 3)
    assert layout.padded_numel == 0
    assert layout.shard_ranges == ((0, 0),) * 3


def test_a_scalar_is_one_element():
    assert FlatLayout([()], 2).shard_ranges == ((0, 1), (1, 1))


@pytest.mark.parametrize("num_shards", [0, -1])
def test_no_shards_are_refused(num_shards):
    with pytest.raises(ValueError, match=f"num_shards: expected at least 1, got {num_shards}"):
        FlatLayout([(3,)], num_shards)
