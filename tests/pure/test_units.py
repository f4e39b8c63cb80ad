"""Which parameters form a unit, and who owns a shared one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from zerompi import units as units_module
from zerompi.units import plan_units


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(2, 2)
        self.second = nn.Linear(2, 2, bias=False)


class Model(nn.Module):
    def __init__(self, blocks):
        super().__init__()
        self.embedding = nn.Embedding(3, 2)
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(2, 3)


class Parts(nn.Module):
    def __init__(self, **modules):
        super().__init__()
        for name, module in modules.items():
            setattr(self, name, module)


BLOCK = ["first.weight", "first.bias", "second.weight"]
ROOT = ["embedding.weight", "head.weight", "head.bias"]


def planned(model, units=None):
    return {plan.name: [name for name, _ in plan.parameters] for plan in plan_units(model, units)}


class Sized(nn.Module):
    """A block of as many KiB."""

    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(256 * size))


def block_plan(prefix):
    return {prefix: [f"{prefix}.{name}" for name in BLOCK]}


def test_repeated_blocks_are_units_and_the_rest_is_the_root():
    expected = {"": ROOT, **block_plan("blocks.0"), **block_plan("blocks.1")}
    assert planned(Model([Block(), Block()])) == expected


def test_plans_name_the_parameters_themselves():
    model = Model([Block(), Block()])
    for plan in plan_units(model):
        for name, parameter in plan.parameters:
            assert parameter is dict(model.named_parameters())[name]
        assert plan.members == [(plan.name, model.get_submodule(plan.name))]


def test_a_block_that_occurs_once_is_no_unit():
    model = Model([Block(), nn.Linear(2, 2)])
    assert list(planned(model)) == [""]
    assert len(planned(model)[""]) == len(list(model.parameters()))


def test_blocks_without_parameters_are_no_units():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2), nn.ReLU())
    assert list(planned(model)) == ["", "0", "2"]


def test_blocks_inside_blocks_belong_to_the_outer_ones():
    model = nn.ModuleList([Parts(inner=nn.ModuleList([Block(), Block()])) for _ in range(2)])
    assert list(planned(model)) == ["", "0", "1"]


def test_containers_inside_containers_are_looked_into():
    model = nn.ModuleList([nn.Sequential(Block(), Block()), nn.Sequential(Block(), Block())])
    assert list(planned(model)) == ["", "0.0", "0.1", "1.0", "1.1"]


def test_blocks_in_a_module_dict_are_found():
    assert list(planned(nn.ModuleDict({"a": Block(), "b": Block()}))) == ["", "a", "b"]


def test_a_predicate_chooses_units():
    model = Model([Block(), Block()])
    names = planned(model, lambda module: isinstance(module, nn.Linear))
    assert list(names) == [
        "",
        *(f"blocks.{i}.{n}" for i in (0, 1) for n in ("first", "second")),
        "head",
    ]
    assert names[""] == ["embedding.weight"]


def test_a_sequence_chooses_units_and_nested_ones_keep_their_own():
    model = Model([Block(), Block()])
    outer = model.blocks[0]
    names = planned(model, [outer, outer.first])
    assert names["blocks.0.first"] == ["blocks.0.first.weight", "blocks.0.first.bias"]
    assert names["blocks.0"] == ["blocks.0.second.weight"]
    assert "blocks.1.second.weight" in names[""]


def test_no_units_leave_everything_to_the_root():
    model = Model([Block(), Block()])
    assert planned(model, []) == {"": [name for name, _ in model.named_parameters()]}


def test_the_root_is_a_unit_though_all_parameters_are_elsewhere():
    assert planned(nn.ModuleList([Block(), Block()]))[""] == []


def test_the_root_may_be_chosen_itself():
    model = Model([Block(), Block()])
    assert list(planned(model, [model])) == [""]
    assert next(iter(planned(model, lambda module: True))) == ""


def test_a_unit_without_parameters_of_its_own_is_left_out():
    model = Parts(a=nn.Linear(2, 2), b=nn.ReLU())
    assert list(planned(model, [model.a, model.b])) == ["", "a"]


def test_a_parameter_shared_by_two_units_goes_to_the_closest_unit_around_both():
    model = Parts(left=Parts(a=Block(), b=Block()), right=Block())
    model.left.b.first.weight = model.left.a.first.weight
    units = [model.left, model.left.a, model.left.b, model.right]
    assert planned(model, units)["left"] == ["left.a.first.weight"]
    model.right.first.weight = model.left.a.first.weight
    assert planned(model, units)[""] == ["left.a.first.weight"]


def test_a_parameter_shared_with_the_root_goes_to_the_root():
    model = Model([Block(), Block()])
    model.blocks[0].first.weight = model.head.weight
    assert planned(model)[""] == ["embedding.weight", "blocks.0.first.weight", "head.bias"]


def test_a_unit_that_hangs_in_several_places_keeps_its_own():
    shared = Block()
    model = Parts(x=Parts(inner=shared), y=Parts(inner=shared))
    assert planned(model, [model.x, model.y, shared]) == {"": [], **block_plan("x.inner")}


def test_a_parameter_of_a_unit_in_several_places_that_another_shares_goes_around_all():
    shared = nn.Linear(2, 2)
    for order in ("inner other", "other inner"):
        model = Parts(x=nn.Module(), y=Parts(inner=shared))
        for name in order.split():
            module = shared if name == "inner" else nn.Linear(2, 2)
            setattr(model.x, name, module)
        model.x.other.weight = shared.weight
        plan = planned(model, [model.x, model.y, shared])
        assert [name.rsplit(".", 1)[1] for name in plan[""]] == ["weight"]
        assert plan["x.inner"] == ["x.inner.bias"]


def test_a_module_that_is_no_unit_but_hangs_in_two_goes_around_both():
    shared = nn.Linear(2, 2)
    model = Parts(x=Parts(inner=shared), y=Parts(inner=shared))
    assert planned(model, [model.x, model.y]) == {"": ["x.inner.weight", "x.inner.bias"]}


@pytest.mark.parametrize("units", [3, nn.Linear(1, 1), "blocks.0", [nn.Linear, 3]])
def test_what_is_no_module_is_refused(units):
    with pytest.raises(TypeError, match="units: expected"):
        plan_units(Model([Block()]), units)


def test_a_module_of_another_model_is_refused():
    with pytest.raises(ValueError, match="units: expected modules of the model"):
        plan_units(Model([Block()]), [nn.Linear(1, 1)])


# -- merging and splitting ---------------------------------------------------------------------


def automatic(model, **options):
    return [plan.name for plan in plan_units(model, **options)]


def test_small_blocks_that_follow_each_other_are_merged_up_to_an_eighth_of_all():
    model = nn.Sequential(*(Sized(1) for _ in range(24)))
    assert automatic(model) == ["", *(f"{start}-{start + 2}" for start in range(0, 24, 3))]
    plan = plan_units(model)[1]
    assert [name for name, _ in plan.parameters] == ["0.weight", "1.weight", "2.weight"]
    assert plan.members == [(str(index), model[index]) for index in range(3)]


def test_few_blocks_are_not_merged():
    model = nn.Sequential(*(Sized(1) for _ in range(15)))
    assert automatic(model) == ["", *map(str, range(15))]


def test_a_merged_unit_has_a_largest_size(monkeypatch):
    monkeypatch.setattr(units_module, "_MERGED_NBYTES", 2048)
    model = nn.Sequential(*(Sized(1) for _ in range(40)))
    assert automatic(model) == ["", *(f"{start}-{start + 1}" for start in range(0, 40, 2))]


def test_a_large_block_stays_alone_between_small_ones():
    sizes = [1, 1, 100, 1, 1, *[100] * 7]
    names = automatic(nn.ModuleList(Sized(size) for size in sizes))
    assert names == ["", "0-1", "2", "3-4", *map(str, range(5, 12))]


def test_blocks_of_different_containers_are_not_merged():
    model = Parts(
        a=nn.ModuleList(Sized(1) for _ in range(10)), b=nn.ModuleList(Sized(1) for _ in range(10))
    )
    assert automatic(model)[1:5] == ["a.0-a.1", "a.2-a.3", "a.4-a.5", "a.6-a.7"]
    assert automatic(model)[-1] == "b.8-b.9"


def test_chosen_units_are_taken_as_they_are():
    model = nn.Sequential(*(Sized(1) for _ in range(24)))
    assert len(planned(model, list(model))) == len(planned(model, lambda m: m is not model)) == 25


def test_a_parameter_shared_inside_a_merged_unit_belongs_to_it():
    model = nn.Sequential(*(Sized(1) for _ in range(24)))
    model[1].weight = model[0].weight
    plans = planned(model)
    assert plans["0-2"] == ["0.weight", "2.weight"]
    model[23].weight = model[0].weight
    assert planned(model)[""] == ["0.weight"]


def test_large_modules_outside_of_blocks_are_units_where_parameters_are_replicated():
    model = Model([Block(), Block()])
    model.embedding = nn.Embedding(1 << 10, 1 << 8)
    blocks = ["blocks.0", "blocks.1"]
    assert automatic(model) == ["", *blocks]
    assert sorted(automatic(model, is_replicated=True)) == ["", *blocks, "embedding"]
    model.head = nn.Linear(1 << 8, 1 << 10)
    model.head.weight = model.embedding.weight  # of neither alone
    assert automatic(model, is_replicated=True) == ["", *blocks]


def test_a_huge_block_is_reduced_in_parts_where_parameters_are_replicated(monkeypatch):
    monkeypatch.setattr(units_module, "_BLOCK_NBYTES", 4 << 20)
    model = nn.ModuleList(Parts(a=Sized(3 << 10), b=Sized(2 << 10), c=Sized(1)) for _ in range(2))
    assert automatic(model) == ["", "0", "1"]
    assert automatic(model, is_replicated=True) == ["", "0", "0.a", "0.b", "1", "1.a", "1.b"]
