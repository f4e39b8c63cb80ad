"""Fine-tuning of Hugging Face directories, made here without a network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from mpi4py import MPI
from safetensors.torch import load_file, save_file

from harness.commands import CommandRun
from zerompi.train.config import InputError
from zerompi.train.data import ByteCodec, load_corpus, training_windows
from zerompi.train.huggingface import make_codec, make_model, names_in_files, parameters_on_meta

transformers = pytest.importorskip("transformers")


def _save_llama(directory: Path, vocabulary: int = 256) -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(directory)


def _save_tied_gpt2(directory: Path) -> None:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=300, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=0,
        eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    assert config.tie_word_embeddings
    transformers.GPT2LMHeadModel(config).save_pretrained(directory)


def _save_gpt2_like_the_hub(directory: Path) -> None:
    """As the first GPT-2 is stored: without the head's prefix, and with the masks of attention."""
    _save_tied_gpt2(directory)
    file = directory / "model.safetensors"
    stored = {name.removeprefix("transformer."): value for name, value in load_file(file).items()}
    for layer in range(2):
        stored[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 64, 64).tril()
    save_file(stored, file, metadata={"format": "pt"})


def _unsharded_losses(directory: Path, steps: int, context: int, batch: int) -> list[float]:
    """The same training without zerompi."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory).float().train()
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": 0.1},
            {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
        ],
        lr=1e-3,
        betas=(0.9, 0.95),
    )
    corpus, losses = load_corpus(None, ByteCodec(), context), []
    for step in range(1, steps + 1):
        inputs, targets = training_windows(
            corpus.train, context, seed=0, step=step, samples=range(batch)
        )
        loss = F.cross_entropy(model(inputs).logits.flatten(0, 1), targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1, step / 4)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    ("save", "recompute"),
    [
        (_save_llama, None),
        (_save_llama, True),
        (_save_tied_gpt2, None),
        (_save_tied_gpt2, True),
        (_save_gpt2_like_the_hub, None),
    ],
)
def test_fine_tuning_follows_unsharded_torch_and_saves_what_transformers_loads(
    comm: MPI.Intracomm,
    train_here: Callable[..., Any],
    shared_path: Path,
    save: Callable[[Path], None],
    recompute: bool | None,
) -> None:
    model = shared_path / "model"
    if comm.rank == 0:
        save(model)
    comm.Barrier()
    run = train_here(
        layers=None, width=None, heads=None, model=model, lr=1e-3, warmup=4, steps=4, batch=12,
        eval_every=0, save_every=4, checkpoint_activations=recompute,
    )  # fmt: skip
    losses = [loss for kind, _, loss in run.losses if kind == "train"]
    assert losses == pytest.approx(_unsharded_losses(model, 4, 16, 12), rel=1e-5)

    saved = transformers.AutoModelForCausalLM.from_pretrained(run.out / "checkpoints" / "step-4")
    corpus = load_corpus(None, ByteCodec(), 16)
    assert saved.float().eval()(torch.from_numpy(corpus.held_out[:16].astype("int64"))[None])
    assert run.summary["run"]["parameters"] == sum(p.numel() for p in saved.parameters())


def test_names_in_files_are_those_that_transformers_would_take(tmp_path: Path) -> None:
    _save_tied_gpt2(tmp_path)
    names = names_in_files(make_model(tmp_path, context=16, checkpoint_activations=False))
    assert names("wte.weight") == names("transformer.wte.weight") == "transformer.wte.weight"
    assert names("lm_head.weight") == "lm_head.weight"
    assert names("h.1.attn.c_attn.bias") == "transformer.h.1.attn.c_attn.bias"
    assert names("h.0.attn.bias") is None
    assert names("layers.0.self_attn.rotary_emb.inv_freq") is None
    assert names("h.7.mlp.c_fc.weight") == "h.7.mlp.c_fc.weight"


@pytest.mark.parametrize("twice", [False, True])
def test_weights_of_another_model_end_in_one_line(
    comm: MPI.Intracomm, command: Callable[..., CommandRun], tmp_path: Path, twice: bool
) -> None:
    path = comm.bcast(tmp_path)
    _save_tied_gpt2(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    stored = load_file(file)
    if twice:
        stored["wte.weight"] = stored["transformer.wte.weight"].clone()
        message = "transformer.wte.weight: expected one tensor, got"
    else:
        stored["h.7.mlp.c_fc.weight"] = torch.ones(2)
        message = "the checkpoint is not of this model: unexpected: h.7.mlp.c_fc.weight"
    save_file(stored, file, metadata={"format": "pt"})
    words = f"train --model {path / 'model'} --out {path / 'out'} --context 16 --batch 12"
    run = command(*words.split())
    assert run.is_refusal(f"error: --model: {path / 'model'}: {message}", comm.rank), run


def test_buffers_have_values_and_parameters_have_none(tmp_path: Path) -> None:
    _save_llama(tmp_path)
    model = make_model(tmp_path, context=16, checkpoint_activations=False)
    whole = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(parameter.is_meta for parameter in model.parameters())
    buffers = dict(model.named_buffers())
    assert "model.rotary_emb.inv_freq" in buffers
    for name, buffer in whole.named_buffers():
        assert buffers[name].equal(buffer), name


def test_parameters_on_meta_keeps_ties_and_leaves_torch_as_it_was() -> None:
    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = torch.nn.Embedding(9, 4)
            self.head = torch.nn.Linear(4, 9, bias=False)
            self.head.weight = self.embedding.weight
            self.frozen = torch.nn.Parameter(torch.ones(2), requires_grad=False)

    before = torch.nn.Module.register_parameter
    with parameters_on_meta():
        model = Tied()
    assert torch.nn.Module.register_parameter is before
    assert model.head.weight is model.embedding.weight
    assert model.head.weight.is_meta
    assert not model.frozen.requires_grad


def test_a_vocabulary_too_small_for_bytes_needs_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="got no tokenizer and a vocabulary of 100"):
        make_codec(tmp_path, 100)


def test_a_context_beyond_the_model_is_refused(tmp_path: Path) -> None:
    _save_llama(tmp_path)
    with pytest.raises(InputError, match=r"--context: expected at most the model's 64, got 65"):
        make_model(tmp_path, context=65, checkpoint_activations=False)


def test_the_directory_s_tokenizer_makes_the_tokens(
    comm: MPI.Intracomm, train_here: Callable[..., Any], shared_path: Path
) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="?"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    text = (Path(__file__).read_text() + Path(train_here.__code__.co_filename).read_text()) * 3
    tokenizer.train_from_iterator(
        [text],
        tokenizers.trainers.BpeTrainer(
            vocab_size=400, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()
        ),
    )
    model, file = shared_path / "model", shared_path / "text.txt"
    if comm.rank == 0:
        _save_llama(model, vocabulary=512)
        transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(model)
        file.write_text(text)
    comm.Barrier()
    run = train_here(layers=None, width=None, heads=None, model=model, data=file, batch=12, steps=2)
    result = run.summary["result"]
    codec = make_codec(model, 512)
    held_out = load_corpus(str(file), codec, 16)
    tokens_per_byte = len(held_out.held_out) / held_out.held_out_bytes
    assert tokens_per_byte < 0.7
    assert result["validation_bits_per_byte"] == pytest.approx(
        result["validation_loss"] / 0.6931471805599453 * tokens_per_byte
    )
