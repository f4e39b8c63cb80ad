from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from zerompi.train.config import InputError, TrainConfig, make_config, read_toml


def test_every_option_can_stand_in_toml_and_the_command_line_wins(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(
        'data = "a.txt"\nstage = 1\neval-every = 7\neval_batches = 3\nlr = 1\nshard-ranks = 2\n'
        "checkpoint-activations = true\n"
    )
    config = make_config({"stage": 2, "steps": None}, read_toml(file))
    assert (config.data, config.stage, config.eval_every, config.eval_batches) == ("a.txt", 2, 7, 3)
    assert (config.learning_rate, config.shard_ranks) == (1.0, "2")
    assert config.checkpoint_activations


def test_the_defaults_survive_a_round_trip_through_a_table() -> None:
    table = {k.replace("_", "-"): v for k, v in TrainConfig().as_dict().items() if v is not None}
    assert make_config({}, table) == TrainConfig()


def test_an_unknown_key_is_refused_by_its_name() -> None:
    with pytest.raises(InputError, match=r"unknown key 'stages'; expected one of .*stage"):
        make_config({}, {"stages": 3})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("stage", "3"),
        ("stage", True),
        ("data", 3),
        ("lr", "fast"),
        ("steps", 1.5),
        ("checkpoint-activations", 1),
    ],
)
def test_a_toml_value_of_another_type_is_refused(key: str, value: object) -> None:
    with pytest.raises(InputError, match=f"{key}: expected"):
        make_config({}, {key: value})


@pytest.mark.parametrize("content", [b"stage = ", b"\xff\xfe"])
def test_a_file_that_is_not_toml_is_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "run.toml"
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"run\.toml"):
        read_toml(file)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("stage", 4, "--stage: expected 0, 1, 2 or 3, got 4"),
        ("dtype", "int8", "--dtype: expected float32 or bfloat16 or float16, got int8"),
        ("batch", 0, "--batch: expected a positive number, got 0"),
        ("eval_every", -1, "--eval-every: expected a number that is not negative, got -1"),
        ("lr", 0.0, "--lr: expected a positive number, got 0.0"),
        ("lr", float("nan"), "--lr: expected a positive number, got nan"),
        ("clip", float("inf"), "--clip: expected 0 or more, got inf"),
        ("heads", 7, "--heads: expected a divisor of --width / 2 = 96, got 7"),
        ("shard_ranks", "half", "--shard-ranks: expected world, node or a number, got half"),
        ("progress", "dots", "--progress: expected auto or bar or lines or none, got dots"),
    ],
)
def test_a_value_that_no_run_can_have_is_refused(name: str, value: object, message: str) -> None:
    with pytest.raises(InputError) as caught:
        make_config({name: value})
    assert str(caught.value) == message


def test_a_node_cache_below_stage_3_is_refused() -> None:
    with pytest.raises(InputError, match="--node-cache: expected False below stage 3, got True"):
        TrainConfig(stage=2, node_cache=True)


def test_steps_and_epochs_together_are_refused() -> None:
    with pytest.raises(InputError, match="--steps or --epochs, not both"):
        TrainConfig(steps=3, epochs=1.0)


def test_an_epoch_is_the_text_once() -> None:
    config = TrainConfig(epochs=2.0, batch=4, context=10)
    assert config.num_steps(100) == 5


def test_the_batch_must_divide_by_ranks_and_passes() -> None:
    config = TrainConfig(batch=24, accumulate=2)
    assert config.micro_batch(4) == 3
    with pytest.raises(InputError, match=r"a multiple of 10 \(5 ranks x 2 passes\), got 24"):
        config.micro_batch(5)


def test_every_option_has_a_help_text() -> None:
    assert all(entry.metadata["help"].endswith(".") for entry in fields(TrainConfig))
