"""The device, if there is one."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture(scope="session")
def cupy() -> Any:
    """CuPy, with a device; else the test is skipped."""
    module = pytest.importorskip("cupy", reason="needs CuPy")
    try:
        module.cuda.runtime.getDeviceCount()
    except module.cuda.runtime.CUDARuntimeError as error:
        pytest.skip(f"needs a CUDA device: {error}")
    return module
