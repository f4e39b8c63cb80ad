"""What cover.py promises: all pairs that can be, in few cases, the same ones on all ranks."""

from __future__ import annotations

import re
from itertools import chain, combinations, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.cover import covering, dealt, shared


def together(rows, strength):
    """What any `strength` columns have together in some row."""
    return {
        (columns, tuple(row[column] for column in columns))
        for row in rows
        for columns in combinations(range(len(row)), strength)
    }


@given(
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    strength=st.integers(1, 3),
    excluded=st.frozensets(st.integers(0, 20)),
    seed=st.text(max_size=3),
)
def test_all_that_a_few_parameters_have_together_occurs(sizes, strength, excluded, seed):
    rows = [row for row in product(*map(range, sizes)) if hash(row) % 23 not in excluded]
    chosen = [rows[position] for position in covering(rows, strength, seed=seed)]
    strength = min(strength, len(sizes))
    assert together(chosen, strength) == together(rows, strength)


@pytest.mark.parametrize(
    ("sizes", "fewest", "most"),
    [((14, 3, 2), 42, 42), ((5, 16, 4), 80, 88), ((4, 4, 4, 4, 4), 16, 32), ((2,) * 10, 6, 14)],
)
def test_all_pairs_need_far_fewer_cases_than_the_product(sizes, fewest, most):
    rows = list(product(*map(range, sizes)))
    assert fewest <= len(covering(rows)) <= most
    assert len(covering(rows, 1)) == max(sizes)


@given(
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    strength=st.integers(1, 3),
    runs=st.integers(1, 3),
)
def test_runs_that_share_the_cases_have_them_all(sizes, strength, runs):
    rows = list(product(*map(range, sizes)))
    of_runs = [[rows[position] for position in run] for run in shared(rows, strength, runs)]
    assert len(of_runs) == runs
    strength = min(strength, len(sizes))
    assert together(list(chain(*of_runs)), strength) == together(rows, strength)
    for chosen in of_runs:
        assert together(chosen, 1) == together(rows, 1)


def test_a_few_runs_need_little_more_than_one():
    rows = list(product(range(5), range(16), range(4)))
    assert sum(map(len, shared(rows, 2, 3))) <= 90


@given(count=st.integers(1, 20), runs=st.integers(1, 6), seed=st.text(max_size=3))
def test_cases_are_dealt_evenly(count, runs, seed):
    hands = dealt(count, runs, seed=seed)
    assert sorted(set(chain(*hands))) == list(range(count))
    sizes = sorted(map(len, hands))
    assert sizes[0] >= 1
    assert sizes[-1] <= max(1, sizes[0] + 1)
    assert sum(sizes) == max(count, runs)


def test_tests_of_one_shape_are_dealt_differently():
    assert len({str(dealt(4, 3, seed=f"test_{number}")) for number in range(20)}) > 10


def test_the_choice_goes_with_the_seed_alone():
    rows = list(product(range(5), range(4), range(3)))
    assert covering(rows, seed="a") == covering(rows, seed="a") != covering(rows, seed="b")


SUITE = """
    @pytest.fixture(params=range(4))
    def layout(request):
        return request.param

    SEEN = []

    @pytest.mark.cover(where=lambda case: case["layout"] != 3 or case["flag"])
    @pytest.mark.parametrize("shape", [[0], [1], [2, 3]])
    @pytest.mark.parametrize("flag", [False, True])
    def test_some(layout, shape, flag):
        SEEN.append((layout, str(shape), flag))

    @pytest.mark.cover(1)
    @pytest.mark.parametrize("shape", [[0], [1], [2, 3]])
    def test_few(layout, shape):
        pass

    @pytest.mark.parametrize("shape", [[0], [1], [2, 3]])
    def test_all(layout, shape):
        pass

    def test_what_was_seen():
        layouts, shapes, flags = map(set, zip(*SEEN))
        assert {(layout, shape) for layout, shape, _ in SEEN} == {
            (layout, shape) for layout in range(4) for shape in shapes
        }
        assert len({(shape, flag) for _, shape, flag in SEEN}) == 6
        assert {(layout, flag) for layout, _, flag in SEEN} == {
            (layout, flag) for layout in range(4) for flag in flags
        } - {(3, False)}
"""


@pytest.mark.parametrize(("value", "some", "few"), [("0", 12, 4), ("1", 21, 12)])
def test_marked_tests_run_with_some_of_their_cases(run_suite, monkeypatch, value, some, few):
    monkeypatch.setenv("ZEROMPI_ALL_CASES", value)
    job = run_suite(SUITE)
    assert job.returncode == 0, job.output
    assert f"{some + few + 12 + 1} passed, {24 - some + 12 - few} deselected" in job.output


@pytest.mark.parametrize(("value", "few"), [("0", 12), ("1", 21)])
def test_runs_share_the_cases_of_each_test(run_suite, monkeypatch, value, few):
    """What each test has seen in three runs: every case that should run, and each run some of it."""
    monkeypatch.setenv("ZEROMPI_ALL_CASES", value)
    seen = {"few": [], "all": [], "one": []}
    for run in ("1/3", "2/3", "3/3"):
        job = run_suite(SHARED, program=("-m", "pytest", "--shared", run, "-s"))
        assert job.returncode == 0, job.output
        for name, runs in seen.items():
            runs.append(re.findall(rf"<{name} (\S*)>", job.output))
            assert runs[-1], f"{name} did not run in {run}"
    assert sorted(chain(*seen["all"])) == sorted(f"{a}{b}" for a in range(4) for b in range(3))
    assert seen["one"] == [["case"]] * 3
    cases = list(chain(*seen["few"]))
    assert few <= len(cases) < 2 * few
    assert {case[:2] for case in cases} == {f"{a}{b}" for a in range(4) for b in range(3)}
    assert all(case[2] == "0" or case[0] != "3" for case in cases)  # as `where` says
    if value == "0":
        for run in seen["few"]:
            assert {case[0] for case in run} == set("0123")
            assert {case[1] for case in run} == set("012")
    else:
        assert len(cases) == len(set(cases)) == 21  # of 24


SHARED = """
    @pytest.mark.cover(where=lambda case: case["layout"] != 3 or not case["flag"])
    @pytest.mark.parametrize("flag", [False, True])
    @pytest.mark.parametrize("layout", range(4))
    @pytest.mark.parametrize("shape", range(3))
    def test_few(layout, shape, flag):
        print(f"<few {layout}{shape}{int(flag)}>" * (WORLD.rank == 0))

    @pytest.mark.parametrize("layout", range(4))
    @pytest.mark.parametrize("shape", range(3))
    def test_all(layout, shape):
        print(f"<all {layout}{shape}>" * (WORLD.rank == 0))

    def test_one():
        print("<one case>" * (WORLD.rank == 0))
"""


@pytest.mark.parametrize(
    ("option", "value"), [("--part", "1+2/3"), ("--shared", "4/3"), ("--shared", "1/2:x")]
)
def test_shares_that_cannot_be_are_refused(run_suite, option, value):
    job = run_suite(SHARED, program=("-m", "pytest", option, value))
    assert job.returncode == 4, job.output  # pytest.ExitCode.USAGE_ERROR
    assert f"{option}: expected K/N or K/N:DIRECTORY with K from 1 to N, got {value}" in job.output
