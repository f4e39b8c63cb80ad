"""Counters of bytes."""

from __future__ import annotations

from zerompi.traffic import INTER_NODE, INTRA_NODE, Traffic


def counted():
    traffic = Traffic()
    traffic.add("all_gather", INTRA_NODE, 10)
    traffic.add("all_gather", INTER_NODE, 5)
    traffic.add("all_gather", INTRA_NODE, 1)
    traffic.add("header", INTRA_NODE, 16)
    return traffic


def test_a_snapshot_has_labels_and_levels():
    expected = {"all_gather": {"intra_node": 11, "inter_node": 5}, "header": {"intra_node": 16}}
    assert counted().snapshot() == expected


def test_totals_by_label_and_level():
    traffic = counted()
    assert traffic.total() == 32
    assert traffic.total("all_gather") == 16
    assert traffic.total(level=INTRA_NODE) == 27
    assert traffic.total("all_gather", INTER_NODE) == 5
    assert traffic.total("nothing") == 0
    assert traffic.messages == 4


def test_a_difference_leaves_out_what_has_not_changed():
    traffic = counted()
    before = traffic.snapshot()
    traffic.add("header", INTRA_NODE, 4)
    traffic.add("refresh", INTER_NODE, 3)
    expected = {"header": {"intra_node": 4}, "refresh": {"inter_node": 3}}
    assert traffic.difference(before) == expected
    assert before == counted().snapshot()
