"""Headers sent ahead: order, what is void after a failure, and how ranks find together again."""

from __future__ import annotations

import random

import pytest

import zerompi
from zerompi.collectives import Group


@pytest.fixture
def apart(comm, monkeypatch):
    """Ranks that send each other messages."""
    monkeypatch.setenv("ZEROMPI_SHARED_MEMORY", "0")
    group = Group(comm)
    yield group
    group.close()


def needs(size, comm):
    if comm.size < size:
        pytest.skip(f"needs {size} ranks")


def sent_ahead(group, *signatures):
    agreements = [group.start_agreement(text, group.rank) for text in signatures]
    assert all(agreement.begin() for agreement in agreements) is (group.size > 1)
    return agreements


def abandon(group, *signatures):
    for agreement in sent_ahead(group, *signatures):
        agreement.cancel()


def test_headers_sent_ahead_are_met_in_order(apart):
    ahead = sent_ahead(apart, *map(str, range(20)))
    assert all(a.finish() == tuple(range(apart.size)) for a in ahead)


def test_a_rank_may_send_its_header_ahead_while_others_do_not(apart):
    for number in range(4):
        agreement = apart.start_agreement("same", number)
        if apart.rank % 2:
            agreement.begin()
        assert agreement.finish() == (number,) * apart.size


def test_at_a_fence_nothing_is_sent_ahead(comm):
    group = Group(comm)
    agreement = group.start_agreement("same", group.rank)
    if group.node is not None:
        assert not agreement.begin()
    assert agreement.finish() == tuple(range(group.size))
    group.close()


def test_a_header_of_the_others_is_void_after_disagreement(apart):
    needs(2, apart.comm)
    first, *rest = sent_ahead(apart, "left" if apart.rank else "right", *"abc"[: apart.rank])
    with pytest.raises(zerompi.MismatchError, match="left"):
        first.finish()
    for agreement in rest:
        agreement.cancel()
    assert apart.agree("next", apart.rank) == tuple(range(apart.size))


def test_while_a_header_is_void_none_is_sent_ahead(apart):
    needs(2, apart.comm)
    abandon(apart, "a")
    assert not apart.start_agreement("b").begin()
    apart.agree("c")
    assert apart.start_agreement("d").begin()


def test_void_headers_of_one_rank_meet_valid_ones_of_the_others(apart):
    needs(2, apart.comm)
    if apart.rank == 0:
        abandon(apart, "x", "y", "z")
        following = [apart.start_agreement(text) for text in "abcd"]
    else:
        following = sent_ahead(apart, *"abcd")
    for agreement in following:
        agreement.finish()


@pytest.mark.parametrize("seed", range(6))
def test_whatever_ranks_abandon_they_find_together_again(apart, seed):
    own, common = random.Random(f"{seed} {apart.rank}"), random.Random(seed)
    for turn in range(12):
        for number in range(own.randrange(4)):
            abandoned = apart.start_agreement(f"{turn}, {number} of rank {apart.rank}")
            if abandoned.begin():
                abandoned.cancel()
        texts = [f"turn {turn}, {number}" for number in range(common.randrange(1, 4))]
        agreements = [apart.start_agreement(text, apart.rank) for text in texts]
        for agreement in agreements[: own.randrange(4)]:
            if not agreement.begin():
                break
        for agreement in agreements:
            assert agreement.finish() == tuple(range(apart.size))
