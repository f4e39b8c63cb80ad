from __future__ import annotations

import pytest
import torch

from zerompi.train.model import GPT, GPTConfig, Rotation, make_gpt


def _gpt(*, checkpoint_activations: bool = False) -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(3, 32, 4, checkpoint_activations=checkpoint_activations))


def test_a_token_sees_only_what_came_before() -> None:
    model = _gpt()
    tokens = torch.randint(0, 256, (2, 16))
    changed = tokens.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 256
    before, after = model(tokens), model(changed)
    assert before.shape == (2, 16, 256)
    assert before[:, :9].equal(after[:, :9])
    assert not before[:, 9].equal(after[:, 9])


def test_attention_depends_on_the_distance_of_positions_only() -> None:
    rotation = Rotation.of_positions(12, 8)
    query, key = torch.randn(8), torch.randn(8)
    scores = rotation.apply(query.expand(12, 8)) @ rotation.apply(key.expand(12, 8)).T
    for distance in (0, 3, -5):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[0].expand_as(diagonal))
    assert scores[0, 0] != scores[0, 3]


def test_checkpointed_activations_give_the_same_gradients() -> None:
    tokens = torch.randint(0, 256, (2, 16))
    plain, checkpointed = _gpt(), _gpt(checkpoint_activations=True)
    for model in (plain, checkpointed):
        model(tokens).square().mean().backward()
    for (name, a), b in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name)


def test_the_untrained_model_knows_nothing() -> None:
    tokens = torch.randint(0, 256, (4, 16))
    loss = torch.nn.functional.cross_entropy(_gpt()(tokens).flatten(0, 1), tokens.flatten())
    assert loss.item() == pytest.approx(5.545, abs=0.05)  # log 256


def test_the_model_is_made_without_memory() -> None:
    config = GPTConfig(layers=48, width=8192, heads=64)
    assert all(parameter.is_meta for parameter in make_gpt(config).parameters())
