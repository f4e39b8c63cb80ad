"""What MPI libraries and their variables say of memory of devices."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from zerompi import cuda_aware

# The vendor that mpi4py tells, and what the library calls itself.
LIBRARIES = {
    "cray": ("MPICH", "MPI VERSION    : CRAY MPICH version 8.1.28 (ANL base 3.4a2)"),
    "mpich": ("MPICH", "MPICH Version:      4.2.0"),
    "mvapich2": ("MVAPICH", "MVAPICH2 Version      :\t2.3.7"),
    "mvapich-plus": ("MVAPICH", "MVAPICH-Plus Version      :\t4.0"),
    "intel": ("Intel MPI", "Intel(R) MPI Library 2021.13 for Linux* OS"),
    "openmpi": ("Open MPI", "Open MPI v5.0.3, package: Open MPI"),
}
VARIABLES = ("MPICH_GPU_SUPPORT_ENABLED", "MV2_USE_CUDA", "MVP_USE_CUDA", "I_MPI_OFFLOAD")


@pytest.fixture
def detect(monkeypatch):
    """`detect(library, queries, **variables)`: the answer where the library has these queries."""

    def ask(library, queries=None, **variables):
        vendor, version = LIBRARIES[library]
        mpi = SimpleNamespace(
            __file__="MPI.so",
            get_vendor=lambda: (vendor, (1, 0, 0)),
            Get_library_version=lambda: version,
        )
        functions = {name: _query(answer) for name, answer in (queries or {}).items()}
        monkeypatch.setattr(cuda_aware, "MPI", mpi)
        monkeypatch.setattr(cuda_aware.ctypes, "CDLL", lambda path: SimpleNamespace(**functions))
        for name in VARIABLES:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        return cuda_aware.detect.__wrapped__()

    return ask


def _query(answer):
    def query():
        assert query.argtypes == ()
        return answer

    return query


@pytest.mark.parametrize(
    ("library", "variable"),
    [
        ("cray", "MPICH_GPU_SUPPORT_ENABLED"),
        ("mvapich2", "MV2_USE_CUDA"),
        ("mvapich-plus", "MVP_USE_CUDA"),
        ("intel", "I_MPI_OFFLOAD"),
    ],
)
@pytest.mark.parametrize(("value", "expected"), [("1", True), ("2", True), ("0", False)])
def test_a_librarys_own_variable_decides(detect, library, variable, value, expected):
    """Whatever a query says, which may know only how the library was built."""
    queries = {"MPIX_Query_cuda_support": int(not expected)}
    answer = detect(library, queries, **{variable: value})
    assert answer == (expected, f"{variable}={value}")


@pytest.mark.parametrize(
    ("library", "foreign"),
    [
        ("cray", ("MV2_USE_CUDA", "MVP_USE_CUDA", "I_MPI_OFFLOAD")),
        ("mpich", VARIABLES),
        ("mvapich2", ("MPICH_GPU_SUPPORT_ENABLED", "I_MPI_OFFLOAD")),
        ("intel", ("MPICH_GPU_SUPPORT_ENABLED", "MV2_USE_CUDA", "MVP_USE_CUDA")),
        ("openmpi", VARIABLES),
    ],
)
def test_another_librarys_variable_says_nothing(detect, library, foreign):
    answer = detect(library, **dict.fromkeys(foreign, "1"))
    assert answer == (False, f"{LIBRARIES[library][0]} has no query for CUDA support")


@pytest.mark.parametrize("value", ["", "yes", "-1", "1.5"])
def test_a_value_that_is_no_number_says_nothing(detect, value):
    queries = {"MPIX_Query_cuda_support": 1}
    answer = detect("cray", queries, MPICH_GPU_SUPPORT_ENABLED=value)
    assert answer == (True, "MPIX_Query_cuda_support says yes")


@pytest.mark.parametrize("library", ["mpich", "openmpi"])
@pytest.mark.parametrize(
    ("queries", "expected"),
    [
        ({"MPIX_Query_cuda_support": 1}, (True, "MPIX_Query_cuda_support says yes")),
        ({"MPIX_Query_cuda_support": 0}, (False, "MPIX_Query_cuda_support says no")),
        (
            {"MPIX_Query_cuda_support": 0, "MPIX_Query_rocm_support": 1},
            (True, "MPIX_Query_rocm_support says yes"),
        ),
        ({"MPIX_Query_hip_support": 1}, (True, "MPIX_Query_hip_support says yes")),
    ],
)
def test_the_query_answers_where_there_is_no_variable(detect, library, queries, expected):
    assert detect(library, queries) == expected
