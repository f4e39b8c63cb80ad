"""Tensors inside arguments and results."""

from __future__ import annotations

import gc
import weakref
from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import pytest
import torch

from zerompi.nested import map_arguments, map_tensors

Pair = namedtuple("Pair", "left right")


@dataclass(frozen=True)
class Frozen:
    value: Any
    name: str = "x"


@dataclass
class Slots:
    __slots__ = ("value",)
    value: Any


def one():
    return torch.ones(1)


STRUCTURES = {
    "tensor": (lambda t: t, lambda s: s),
    "tuple": (lambda t: (1, t), lambda s: s[1]),
    "list": (lambda t: [t, None], lambda s: s[0]),
    "dict": (lambda t: {"a": t, "b": 2}, lambda s: s["a"]),
    "ordered dict": (lambda t: OrderedDict(a=t), lambda s: s["a"]),
    "mapping proxy": (lambda t: MappingProxyType({"a": t}), lambda s: s["a"]),
    "namedtuple": (lambda t: Pair("l", t), lambda s: s.right),
    "frozen dataclass": (lambda t: Frozen(t), lambda s: s.value),
    "dataclass with slots": (lambda t: Slots(t), lambda s: s.value),
    "deep": (lambda t: {"a": [(Frozen(Pair(t, 1)),)]}, lambda s: s["a"][0][0].value.left),
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_every_tensor_is_found_and_replaced_in_a_copy(name):
    make, get = STRUCTURES[name]
    tensor = one()
    structure = make(tensor)
    found = []
    mapped = map_tensors(lambda t: found.append(t) or t + 1, structure)
    assert [t is tensor for t in found] == [True]
    assert type(mapped) is type(structure)
    assert get(mapped).item() == 2.0
    assert get(structure) is tensor
    assert tensor.item() == 1.0


@pytest.mark.parametrize("name", STRUCTURES)
def test_what_does_not_change_is_passed_on_itself(name):
    structure = STRUCTURES[name][0](one())
    assert map_tensors(lambda t: t, structure) is structure


@pytest.mark.parametrize("value", [None, 3, "text", b"bytes", range(3), torch.Size([1, 2]), Frozen])
def test_what_holds_no_tensor_is_left_alone(value):
    assert map_tensors(lambda t: t + 1, value) is value


def test_tensors_come_in_order():
    tensors = [torch.tensor(i) for i in range(5)]
    structure = (tensors[0], {"a": [tensors[1], tensors[2]], "b": Frozen(tensors[3])}, tensors[4])
    found = []
    map_tensors(lambda t: found.append(int(t)) or t, structure)
    assert found == [0, 1, 2, 3, 4]


def test_the_results_of_torch_functions_are_mapped():
    result = torch.max(torch.tensor([[1.0, 2.0]]), dim=1)
    mapped = map_tensors(lambda t: t * 10, result)
    assert type(mapped) is type(result)
    assert (mapped.values.item(), mapped.indices.item()) == (20.0, 10)


def test_packed_sequences_are_mapped():
    packed = torch.nn.utils.rnn.pack_sequence([torch.ones(2, 1), torch.ones(1, 1)])
    mapped = map_tensors(lambda t: t * 2 if t.is_floating_point() else t, packed)
    assert mapped.data.sum().item() == 6.0
    assert mapped.batch_sizes is packed.batch_sizes


def test_model_outputs_of_transformers_are_mapped():
    outputs = pytest.importorskip("transformers.modeling_outputs")
    output = outputs.BaseModelOutput(last_hidden_state=one(), hidden_states=(one(), one()))
    mapped = map_tensors(lambda t: t + 1, output)
    assert type(mapped) is outputs.BaseModelOutput
    assert mapped.last_hidden_state.item() == mapped["last_hidden_state"].item() == 2.0
    assert [t.item() for t in mapped.hidden_states] == [2.0, 2.0]
    assert output.last_hidden_state.item() == output["last_hidden_state"].item() == 1.0


def test_what_arguments_were_mapped_to_dies_without_the_garbage_collector():
    def mapped():
        results = []
        args, kwargs = map_arguments(
            lambda tensor: results.append(2 * tensor) or results[-1], ((one(),),), {"x": one()}
        )
        assert [args[0][0].item(), kwargs["x"].item()] == [2.0, 2.0]
        return [weakref.ref(result) for result in results]

    is_enabled = gc.isenabled()
    gc.disable()
    try:
        assert [result() for result in mapped()] == [None, None]
    finally:
        if is_enabled:
            gc.enable()
