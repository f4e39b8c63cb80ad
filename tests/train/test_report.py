"""What a run writes and shows: metrics, progress, theory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from zerompi.accounting import MessageBytes
from zerompi.report import MemoryReport, Report
from zerompi.train.display import LineDisplay, StepMetrics, make_display
from zerompi.train.job import lr_factor
from zerompi.train.metrics import MetricsLog
from zerompi.train.summary import Meter, traffic_theory


def _steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_a_resumed_run_replaces_the_lines_that_it_repeats(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 1)
    for step in range(1, 6):
        log.write("train", step, loss=float(step))
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')  # cut off by a kill
    log = MetricsLog(tmp_path, 4)
    log.write("train", 4, loss=0.0)
    log.close()
    assert _steps(tmp_path / "metrics.jsonl") == [1, 2, 3, 4]


def test_a_new_run_starts_with_empty_metrics(tmp_path: Path) -> None:
    for _ in range(2):
        log = MetricsLog(tmp_path, 1)
        log.write("train", 1, loss=1.0)
        log.close()
    assert _steps(tmp_path / "metrics.jsonl") == [1]
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1


def test_numbers_that_json_lacks_read_null(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 1)
    log.write("train", 1, loss=float("nan"), grad_norm=float("inf"))
    log.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {
        "kind": "train",
        "step": 1,
        "loss": None,
        "grad_norm": None,
    }


def test_lines_are_about_twenty_and_have_loss_speed_and_memory(
    capsys: pytest.CaptureFixture[str],
) -> None:
    display = LineDisplay(1000)
    for step in range(1, 1001):
        display.step(StepMetrics(step, 2.5, 0.1, 1.0, 12345.6, 3 * 2**20))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 21
    assert lines[0] == "step    1/1000  loss 2.5000  12,346 tokens/s  memory 3 MiB"
    assert lines[-1].startswith("step 1000/1000")


def test_other_ranks_than_the_first_show_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    display = make_display("lines", 10, 0, shows=False)
    display.say("hello")
    display.step(StepMetrics(1, 2.5, 0.1, 1.0, 1.0, 1))
    assert capsys.readouterr().out == ""


def test_the_learning_rate_rises_and_falls_to_a_tenth() -> None:
    factor = lr_factor(10, 110)
    assert [factor(0), factor(4), factor(9), factor(10)] == pytest.approx([0.1, 0.5, 1, 1])
    assert factor(60) == pytest.approx(0.55)
    assert factor(110) == factor(500) == pytest.approx(0.1)


@pytest.mark.parametrize(("stage", "elements"), [(0, 2), (1, 2), (2, 2), (3, 3)])
def test_theory_is_two_or_three_times_the_parameters(stage: int, elements: int) -> None:
    theory = traffic_theory(
        1000, stage=stage, num_shards=4, num_replicas=1, num_copies=4, param_nbytes=4, passes=1
    )
    assert sum(theory.values()) == pytest.approx(elements * 1000 * 4 * 3 / 4)


def test_theory_of_several_copies_adds_the_reduction_between_them() -> None:
    theory = traffic_theory(
        1000, stage=3, num_shards=2, num_replicas=2, num_copies=2, param_nbytes=2, passes=3
    )
    assert theory == {"reduce_scatter": 2000, "all_gather": 6000, "all_reduce": 2000}


@pytest.mark.parametrize("stage", [1, 3])
def test_theory_of_one_node_moves_gradients_only(stage: int) -> None:
    theory = traffic_theory(
        1000, stage=stage, num_shards=4, num_replicas=1, num_copies=1, param_nbytes=4, passes=1
    )
    assert theory == {"reduce_scatter": 3000}


def test_theory_of_a_node_cache_gathers_once() -> None:
    """Of 4 ranks on 2 nodes; with memory of their own, the ranks of a node gather among themselves."""
    same = {"stage": 3, "num_shards": 4, "num_replicas": 1, "param_nbytes": 4, "num_keepers": 2}
    shared = traffic_theory(1000, num_copies=2, passes=3, **same)
    assert shared == {"reduce_scatter": 3000, "all_gather": 1000}
    private = traffic_theory(1000, num_copies=4, passes=3, **same)
    assert private == {"reduce_scatter": 3000, "all_gather": 3000 + 5 * 2000}
    spared = traffic_theory(1000, num_copies=4, passes=3, spared=400, **same)
    assert spared == {"reduce_scatter": 3000, "all_gather": 3000 + 5 * 2000 - 200}


def test_theory_of_what_stays_gathers_it_once() -> None:
    same = {"stage": 3, "num_shards": 4, "num_replicas": 1, "param_nbytes": 4, "passes": 2}
    private = traffic_theory(1000, num_copies=4, spared=800, **same)
    assert private == {"reduce_scatter": 3000, "all_gather": (4 * 4000 - 800) * 3 / 4}
    shared = traffic_theory(1000, num_copies=2, spared=800, **same)
    assert shared == {"reduce_scatter": 3000, "all_gather": (4 * 4000 - 800) / 4}
    quantized = traffic_theory(
        1000, num_copies=4, spared=200, quantized=MessageBytes(1000, 4000), **same
    )
    assert quantized == {"reduce_scatter": 3000, "all_gather": (4 * 1000 - 200) * 3 / 4}


def test_seconds_of_phases_are_means_over_the_steps_that_no_evaluation_preceded() -> None:
    meter = Meter()
    for step in range(1, 5):
        report = Report(
            traffic={}, memory=MemoryReport({}, {}, {}), time={"gather": 100.0 if step > 2 else 0.5}
        )
        meter.add(report, 2.0, evaluated_before=step > 2)
    assert meter.seconds == 8
    assert meter.phase_means == {"forward and backward": 1.5, "gather": 0.5}
    assert Meter().phase_means == {}
