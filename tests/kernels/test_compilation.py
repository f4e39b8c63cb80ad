"""Kernels compile for every supported architecture, and compute as IEEE 754 says; no GPU is needed."""

from __future__ import annotations

import pytest

from zerompi.device import compiler
from zerompi.kernels import adamw, casting, norm, packing, quantization_on_device, summation

MODULES = [adamw, casting, norm, packing, quantization_on_device, summation]


@pytest.fixture(scope="session")
def nvrtc():
    """CuPy's NVRTC."""
    pytest.importorskip("cupy", reason="needs CuPy for NVRTC")
    from cupy.cuda import nvrtc

    try:
        nvrtc.getVersion()
    except (ImportError, OSError, RuntimeError) as error:
        pytest.skip(f"needs NVRTC: {error}")
    return nvrtc


def compiled(nvrtc, source, target):
    program = nvrtc.createProgram(source, "kernels.cu", (), ())
    try:
        nvrtc.compileProgram(program, (*compiler.OPTIONS, f"--gpu-architecture={target}"))
    except nvrtc.NVRTCError:
        pytest.fail(nvrtc.getProgramLog(program))
    is_binary = target.startswith("sm_")
    return nvrtc.getCUBIN(program) if is_binary else nvrtc.getPTX(program)


@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__.split(".")[-1])
def test_kernels_compile(nvrtc, module, architecture):
    if architecture not in nvrtc.getSupportedArchs():
        pytest.skip(f"this NVRTC does not know sm_{architecture}")
    assert compiled(nvrtc, module.SOURCE, f"sm_{architecture}").startswith(b"\x7fELF")


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__.split(".")[-1])
def test_nothing_is_fused_flushed_or_approximated(nvrtc, module):
    text = compiled(nvrtc, module.SOURCE, "compute_80").decode()
    assert "ret;" in text
    words = {word for line in text.splitlines() for word in line.split()[:2]}
    inexact = [w for w in words if w.startswith("fma.") or ".ftz" in w or ".approx" in w]
    assert inexact == []
