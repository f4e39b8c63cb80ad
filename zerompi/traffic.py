"""Counters of the bytes that this rank sends."""

from __future__ import annotations

from collections.abc import Mapping

INTRA_NODE = "intra_node"
INTER_NODE = "inter_node"
INTER_GROUP = "inter_group"

Counts = dict[str, dict[str, int]]


def between_nodes(counts: Mapping[str, Mapping[str, int]]) -> int:
    """The bytes among these that went to other nodes."""
    return sum(levels.get(INTER_NODE, 0) + levels.get(INTER_GROUP, 0) for levels in counts.values())


class Traffic:
    """Bytes sent, by label (what for) and level: "intra_node", "inter_node", "inter_group".

    "inter_node" is between nodes of a group; where there are no groups, between any nodes.
    """

    def __init__(self) -> None:
        self._bytes: dict[tuple[str, str], int] = {}
        self.messages = 0

    def add(self, label: str, level: str, nbytes: int) -> None:
        """Count one message of `nbytes`."""
        key = (label, level)
        self._bytes[key] = self._bytes.get(key, 0) + nbytes
        self.messages += 1

    def snapshot(self) -> Counts:
        """All counts as {label: {level: bytes}}."""
        counts: Counts = {}
        for (label, level), nbytes in self._bytes.items():
            counts.setdefault(label, {})[level] = nbytes
        return counts

    def difference(self, since: Mapping[str, Mapping[str, int]]) -> Counts:
        """What was counted after the snapshot `since`."""
        result: Counts = {}
        for label, levels in self.snapshot().items():
            for level, nbytes in levels.items():
                more = nbytes - since.get(label, {}).get(level, 0)
                if more:
                    result.setdefault(label, {})[level] = more
        return result

    def total(self, label: str | None = None, level: str | None = None) -> int:
        """Bytes sent so far, of one label or all, at one level or both."""
        return sum(
            nbytes
            for (a_label, a_level), nbytes in self._bytes.items()
            if label in (None, a_label) and level in (None, a_level)
        )
