"""Hugging Face model directories: the model without its weights, and the tokenizer."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from zerompi.train.config import InputError
from zerompi.train.data import ByteCodec, Codec, Tokens

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
)
# Beside the weights, these make a checkpoint a directory that transformers loads.
_COMPANIONS = (
    *_TOKENIZER_FILES,
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template.jinja",
)
# Buffers of earlier versions of transformers that models calculate today; no class lists them.
_CALCULATED = r"rotary_emb\.inv_freq$"


class TokenizerCodec:
    """The tokens of a Hugging Face tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.name = type(tokenizer).__name__

    def encode(self, text: NDArray[np.uint8]) -> Tokens:
        """Token ids of UTF-8 `text`, without special tokens."""
        decoded = text.tobytes().decode("utf-8", errors="replace")
        ids = self._tokenizer(decoded, add_special_tokens=False, verbose=False)["input_ids"]
        return np.asarray(ids, dtype=np.int32)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of `tokens`."""
        return str(self._tokenizer.decode(list(tokens)))


def make_model(directory: Path, *, context: int, checkpoint_activations: bool) -> nn.Module:
    """The causal language model of `directory`: parameters on the meta device, buffers with values.

    Raises:
        InputError: there is no such model, or its context is shorter than `context`.
    """
    transformers = _transformers()
    for name, pattern in (("config.json", "config.json"), ("a safetensors file", "*.safetensors")):
        if not any(directory.glob(pattern)):
            raise InputError(f"--model: {directory}: expected a directory with {name}, got none")
    config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True)
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and context > positions:
        raise InputError(f"--context: expected at most the model's {positions}, got {context}")
    config.use_cache = False
    with parameters_on_meta():
        model: nn.Module = transformers.AutoModelForCausalLM.from_config(
            config, dtype=torch.float32
        )
    if checkpoint_activations:
        model.gradient_checkpointing_enable(  # type: ignore[operator]
            gradient_checkpointing_kwargs={"use_reentrant": False}
        )
    return model.train()


def names_in_files(model: nn.Module) -> Callable[[str], str | None]:
    """For `zero.load`: the model's name of a tensor stored in a file; None if the model ignores it.

    As `from_pretrained` does it: files of the model without its head lack the head's prefix
    (`wte.weight` instead of `transformer.wte.weight`), and old files hold buffers that are
    calculated today.
    """
    known = set(model.state_dict())
    calculated = {name for name, _ in model.named_buffers()} - known
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    ignored = [_CALCULATED, *(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())]

    def name_in_model(stored: str) -> str | None:
        for name in (stored, prefix + stored):
            if name in known:
                return name
            if name in calculated:
                return None
        if any(re.search(pattern, stored) for pattern in ignored):
            return None
        return stored

    return name_in_model


def make_codec(directory: Path, vocabulary: int) -> Codec:
    """The directory's tokenizer; bytes where it has none.

    Raises:
        InputError: bytes do not fit into `vocabulary`.
    """
    if any((directory / name).exists() for name in _TOKENIZER_FILES):
        return TokenizerCodec(
            _transformers().AutoTokenizer.from_pretrained(directory, local_files_only=True)
        )
    if vocabulary < 256:
        raise InputError(
            f"--model: {directory}: expected a tokenizer or a vocabulary of 256 for bytes, got no "
            f"tokenizer and a vocabulary of {vocabulary}"
        )
    return ByteCodec()


def companions(directory: Path) -> list[Path]:
    """The small files of `directory` that belong beside the weights of its model."""
    return [directory / name for name in _COMPANIONS if (directory / name).is_file()]


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules made inside have their parameters on the meta device and their buffers on the host.

    With `torch.device("meta")` buffers would be lost as well, and those that no checkpoint holds,
    such as the frequencies of rotary embeddings, could not come back.
    """
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            param = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)
        register(module, name, param)

    nn.Module.register_parameter = register_on_meta  # type: ignore[assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _transformers() -> Any:
    try:
        import transformers.utils.logging
    except ImportError:
        raise InputError(
            "--model: expected the package transformers to be installed, got none; "
            "pip install 'zerompi[hf]'"
        ) from None
    transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    return transformers
