"""Models under test lie where ZEROMPI_TEST_MEMORY says, or where a test puts them itself."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import zerompi
from harness.memory import ON_DEVICE, host_may_touch, on_device


@pytest.fixture(autouse=True)
def _memory_under_test(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    is_placed = request.node.get_closest_marker("placed") is not None
    if not ON_DEVICE and not is_placed:
        yield
        return
    if not is_placed:
        monkeypatch.setattr(zerompi, "partition", on_device(zerompi.partition))
    if ON_DEVICE:
        # An emulated device fills new memory, of which the models of tests need little.
        for module in ("transport", "staging", "shared"):
            monkeypatch.setattr(f"zerompi.collectives.{module}.STAGING_NBYTES", 1 << 16)
    with host_may_touch(monkeypatch):
        yield
