"""Whether the MPI library reads and writes memory of devices: asked, never tried.

A library that cannot dies of a device's address, so nothing here hands it one (`zerompi info --probe`
does, in a job of its own). Nothing here starts CUDA either.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache
from typing import NamedTuple

from mpi4py import MPI

_QUERIES = ("MPIX_Query_cuda_support", "MPIX_Query_hip_support", "MPIX_Query_rocm_support")
# Variables with which a site, or a user, turns support on; the libraries have no query, or one that
# knows only how they were built.
_VARIABLES = ("MPICH_GPU_SUPPORT_ENABLED", "MV2_USE_CUDA", "MVP_USE_CUDA", "I_MPI_OFFLOAD")


class Answer(NamedTuple):
    """Whether the library can, and who says so."""

    is_aware: bool
    source: str


@cache
def detect() -> Answer:
    """What the library and its environment variables say. Call it after MPI was initialised."""
    vendor, _ = MPI.get_vendor()
    for variable in _VARIABLES:
        value = os.environ.get(variable, "")
        if value.isdigit() and _belongs(variable, vendor):
            return Answer(int(value) > 0, f"{variable}={value}")
    library = ctypes.CDLL(MPI.__file__)  # finds what the libraries behind it have, too
    answers = []
    for query in _QUERIES:
        function = getattr(library, query, None)
        if function is not None:
            function.argtypes, function.restype = (), ctypes.c_int
            answers.append((query, bool(function())))
    for query, yes in answers:
        if yes:
            return Answer(is_aware=True, source=f"{query} says yes")
    if answers:
        return Answer(is_aware=False, source=f"{answers[0][0]} says no")
    return Answer(is_aware=False, source=f"{vendor} has no query for CUDA support")


def _belongs(variable: str, vendor: str) -> bool:
    """Whether a library reads the variable: another one's may be set on the whole machine."""
    is_mpich = vendor not in ("Open MPI", "Intel MPI")
    if variable.startswith("I_MPI"):
        return vendor == "Intel MPI"
    if variable.startswith("MPICH"):
        return is_mpich and "CRAY" in MPI.Get_library_version().upper()
    return is_mpich and "MVAPICH" in MPI.Get_library_version().upper()
