"""What cover.py promises: all pairs that can be, in few cases, the same ones on all ranks."""

from __future__ import annotations

import re
from itertools import combinations, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.cover import covering, shared


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
    sizes=st.lists(st.integers(1, 5), max_size=3),
    strength=st.integers(1, 3),
    runs=st.integers(1, 3),
    pairs=st.booleans(),
)
def test_runs_that_share_the_cases_have_them_all(sizes, strength, runs, pairs):
    rows = list(product(*map(range, sizes)))
    of_runs = shared(rows, strength, runs, pairs=pairs)
    assert len(of_runs) == runs and all(of_runs)
    strength = min(strength, len(sizes))
    somewhere = [rows[position] for positions in of_runs for position in positions]
    assert together(somewhere, strength) == together(rows, strength)
    if pairs:
        for positions in of_runs:
            chosen = [rows[position] for position in positions]
            assert together(chosen, min(1, len(sizes))) == together(rows, min(1, len(sizes)))


def test_a_few_runs_need_little_more_than_one():
    rows = list(product(range(5), range(16), range(4)))
    of_runs = shared(rows, 2, 3, pairs=True)
    assert sum(map(len, of_runs)) <= 90
    assert sorted(sum(shared(rows, len(rows), 3, pairs=False), [])) == list(range(len(rows)))


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


@pytest.mark.parametrize("value", ["0", "1"])
def test_runs_share_the_cases_of_each_test(run_suite, monkeypatch, value):
    """What each test has seen in three runs: every case of it, and each run some."""
    monkeypatch.setenv("ZEROMPI_ALL_CASES", value)
    seen = {"few": [], "all": [], "one": []}
    for run in ("1/3", "2/3", "3/3"):
        job = run_suite(SHARED, program=("-m", "pytest", "--shared", run, "-s"))
        assert job.returncode == 0, job.output
        for name, cases in seen.items():
            cases.append(set(re.findall(rf"<{name} \S*>", job.output)))
            assert cases[-1]
    counts = {name: len(set.union(*cases)) for name, cases in seen.items()}
    assert counts == {"few": 12, "all": 12, "one": 1}
    runs = sum(len(cases) for cases in seen["all"])
    assert runs == (36 if value == "1" else 12)
    for cases in seen["few"]:
        assert {case.split()[1][0] for case in cases} == set("0123")


SHARED = """
    @pytest.mark.cover
    @pytest.mark.parametrize("layout", range(4))
    @pytest.mark.parametrize("shape", range(3))
    def test_few(layout, shape):
        print(f"<few {layout}{shape}>" * (WORLD.rank == 0))

    @pytest.mark.parametrize("layout", range(4))
    @pytest.mark.parametrize("shape", range(3))
    def test_all(layout, shape):
        print(f"<all {layout}{shape}>" * (WORLD.rank == 0))

    def test_one():
        print("<one case>" * (WORLD.rank == 0))
"""
