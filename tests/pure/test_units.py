"""Which parameters form a unit, and who owns a shared one."""

from __future__ import annotations

import pytest
from torch import nn

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
