"""The random number generators of all ranks: what a checkpoint keeps of them, and how they go on."""

from __future__ import annotations

import base64
import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

Install = Callable[[], object]


def generator_states() -> dict[str, Any]:
    """The states of torch's, NumPy's and Python's global generators, for JSON.

    Those of the GPUs are among them where this process has used one.
    """
    name, keys, position, has_gauss, gauss = _numpy_state(np.random.get_state())
    words = base64.b64encode(np.asarray(keys).tobytes()).decode()
    version, python_words, next_gauss = random.getstate()
    states: dict[str, Any] = {
        "torch": _text(torch.get_rng_state()),
        "numpy": [name, words, position, has_gauss, gauss],
        "python": [version, list(python_words), next_gauss],
    }
    if torch.cuda.is_initialized():
        states["cuda"] = [_text(state) for state in torch.cuda.get_rng_state_all()]
    return states


def states_of_rank(saved: Sequence[Mapping[str, Any]], rank: int, size: int) -> dict[str, Any]:
    """The states, of those that all ranks of a checkpoint had, with which a rank of `size` goes on.

    With as many ranks as before each has its own again. With fewer the first ones go on. With more,
    each new rank gets a stream of its own, the same in every run, that depends on rank 0's state. A kind
    of generator that was in the same state on all ranks is so again: the program draws something
    common from it.
    """
    states: dict[str, Any] = {}
    for kind, first in (saved[0] if saved else {}).items():
        of_ranks = [states_of_one.get(kind) for states_of_one in saved]
        if all(state == first for state in of_ranks):
            states[kind] = first
        elif rank < len(saved):
            states[kind] = of_ranks[rank]
        else:
            digest = hashlib.sha256(f"{kind} {first} {rank}".encode()).digest()
            states[kind] = _new_state(kind, first, int.from_bytes(digest[:4], "little"))
    return states


def _new_state(kind: str, like: Any, seed: int) -> Any:
    if kind == "torch":
        return _text(torch.Generator().manual_seed(seed).get_state())
    if kind == "numpy":
        words = _numpy_state(np.random.RandomState(seed).get_state())[1]
        return ["MT19937", base64.b64encode(np.asarray(words).tobytes()).decode(), 624, 0, 0.0]
    if kind == "python":
        version, python_words, next_gauss = random.Random(seed).getstate()
        return [version, list(python_words), next_gauss]
    return [seed + device for device in range(len(like))]  # cuda: seeds, not states


def prepare_states(states: Mapping[str, Any]) -> list[Install]:
    """Check states; return what puts the generators into them.

    Raises:
        ValueError: these are no states of such generators.
    """
    try:
        return [step for kind, state in states.items() for step in _PREPARE[kind](state)]
    except (ValueError, TypeError, KeyError, IndexError, RuntimeError, OverflowError) as error:
        raise ValueError(f"rng: expected states of generators, got others: {error}") from error


def _prepare_torch(state: str) -> list[Install]:
    tensor = _tensor(state)
    torch.Generator().set_state(tensor)
    return [partial(torch.set_rng_state, tensor)]


def _prepare_numpy(state: Sequence[Any]) -> list[Install]:
    name, keys, position, has_gauss, gauss = state
    words = np.frombuffer(base64.b64decode(keys, validate=True), dtype=np.uint32)
    if not 0 <= position <= len(words):
        raise ValueError(f"position {position} of NumPy's generator")
    prepared = (name, words, position, has_gauss, gauss)
    np.random.RandomState().set_state(prepared)
    return [partial(np.random.set_state, prepared)]


def _prepare_python(state: Sequence[Any]) -> list[Install]:
    version, words, next_gauss = state
    prepared = (version, tuple(words), next_gauss)
    random.Random().setstate(prepared)
    return [partial(random.setstate, prepared)]


def _prepare_cuda(states: Sequence[str | int]) -> list[Install]:
    steps: list[Install] = []
    for device, state in enumerate(states[: torch.cuda.device_count()]):
        with torch.cuda.device(device):
            if isinstance(state, int):
                steps.append(partial(_seed_cuda, state, device))
            else:
                tensor = _tensor(state)
                torch.Generator(f"cuda:{device}").set_state(tensor)
                steps.append(partial(torch.cuda.set_rng_state, tensor, device))
    return steps


def _seed_cuda(seed: int, device: int) -> None:
    with torch.cuda.device(device):
        torch.cuda.manual_seed(seed)


_PREPARE: dict[str, Callable[[Any], list[Install]]] = {
    "torch": _prepare_torch,
    "numpy": _prepare_numpy,
    "python": _prepare_python,
    "cuda": _prepare_cuda,
}


def _numpy_state(state: Any) -> tuple[str, Any, int, int, float]:
    """NumPy's stubs allow a dict that it gives to those only who ask for one."""
    return tuple(state)


def _text(state: Tensor) -> str:
    return base64.b64encode(bytes(state.numpy())).decode()


def _tensor(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text, validate=True)), dtype=torch.uint8)
