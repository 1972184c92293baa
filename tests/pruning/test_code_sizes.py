"""Sizes that stand in a module's code follow the units that stay, in every kind of code."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from optin_export.pruning import rebuild, verified, verify
from optin_export.pruning.code_sizes import is_code_size, replace_size
from optin_export.pruning.saved_units import SavedUnits, saved_units
from optin_export.units import Structure
from optin_export.units.discovery import found_structure
from optin_export.units.trace import observe_pass
from tests.pruning import forwards
from tests.pruning.test_verify import check_plans
from tests.repair.plans import halved


def structure_of(model: Any) -> Structure:
    inputs = forwards.inputs()
    return verified(model, found_structure(model, inputs, observe_pass(model, inputs), None), inputs)


def heads(structure: Structure) -> list[Any]:
    return [group for group in structure.groups if group.kind == "heads"]


@pytest.mark.parametrize("kind", forwards.FORWARDS)
def test_heads_of_every_kind_of_code_are_removed_exactly(kind: str) -> None:
    model = forwards.model(kind)
    structure = structure_of(model)
    assert not structure.refused
    assert [(group.kind, group.count) for group in structure.groups] == [
        ("heads", 3 if kind == "Constants" else 4),
        ("neurons", 12),
    ]
    check_plans(model, structure, forwards.inputs())


def test_blocks_of_one_class_with_other_code_get_their_own_sizes() -> None:
    model = forwards.model("InputWidth", "FewerKeys", "Scaled", "InputWidth")
    structure = structure_of(model)
    names = [{name.partition("attention.")[2] for name, _ in group.sizes} for group in heads(structure)]
    assert len(names) == 4 and names[0] == names[3] != names[1]
    check_plans(model, structure, forwards.inputs())


class Changing(nn.Module):
    """Shifts its tokens in every other instance, as blocks with windows do; the class is the same."""

    def __init__(self, shifted: bool) -> None:
        super().__init__()
        self.attention, self.shifted = forwards.InputWidth(), shifted
        self.qkv, self.proj = self.attention.qkv, self.attention.proj
        del self.attention

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, tokens, width = x.shape
        if self.shifted:
            x = x.roll(1, 1).reshape(rows, tokens, width)
        q, k, v = self.qkv(x).reshape(rows, tokens, 3, 4, width // 4).permute(2, 0, 3, 1, 4)
        mixed = (q @ k.mT).softmax(-1) @ v
        return self.proj(mixed.transpose(1, 2).reshape(rows, tokens, width))


def test_instances_of_one_class_that_run_other_code_get_their_own_sizes() -> None:
    model = forwards.model("InputWidth", "InputWidth", "InputWidth")
    for number, block in enumerate(model.blocks):
        block.attention = Changing(shifted=number == 1)
    model.requires_grad_(False)
    structure = structure_of(model)
    names = [{name.partition("attention.")[2] for name, _ in group.sizes} for group in heads(structure)]
    assert names == [{"(reshape 0 3)", "(reshape 1 2)"}, {"(reshape 1 3)", "(reshape 2 2)"}, names[0]]
    check_plans(model, structure, forwards.inputs())


def test_a_block_whose_own_sizes_are_not_measured_takes_those_of_a_like_block(monkeypatch: pytest.MonkeyPatch) -> None:
    real = verify.measured_sizes

    def of_the_first(model: Any, group: Any, *given: Any) -> Any:
        return real(model, group, *given) if group.block == 0 else []

    monkeypatch.setattr(verify, "measured_sizes", of_the_first)
    model = forwards.model("InputWidth", "InputWidth")
    structure = structure_of(model)
    names = [{name.partition("attention.")[2] for name, _ in group.sizes} for group in heads(structure)]
    assert names == [{"(reshape 0 3)", "(reshape 1 2)"}] * 2
    check_plans(model, structure, forwards.inputs())


def test_a_block_that_runs_several_times_is_measured_in_its_first_run() -> None:
    """In the later ones everything that it reads changes with the units."""
    model = forwards.model("InputWidth")
    block = model.blocks[0]
    model.blocks = nn.Sequential(block, block, block)
    (group,) = heads(structure_of(model))
    assert group.sizes == (("blocks.0.attention.(reshape 0 3)", 1), ("blocks.0.attention.(reshape 1 2)", 4))
    check_plans(model, structure_of(model), forwards.inputs())


def test_the_number_of_a_call_and_the_size_per_head_are_measured() -> None:
    (group,) = heads(structure_of(forwards.model("InputWidth")))
    assert group.sizes == (("blocks.0.attention.(reshape 0 3)", 1), ("blocks.0.attention.(reshape 1 2)", 4))


def test_of_as_many_heads_as_projections_the_heads_are_cut() -> None:
    (group,) = heads(structure_of(forwards.model("Constants")))
    assert group.sizes == (("blocks.0.attention.(unflatten 0 1)", 1),)


def test_a_size_that_grows_with_the_batch_is_left_open() -> None:
    (group,) = heads(structure_of(forwards.model("MergedBatch")))
    per_unit = {name.rpartition(".")[2]: size for name, size in group.sizes}
    assert per_unit["(split 0 0)"] == 4
    assert [per_unit[f"(reshape {number} 0)"] for number in (1, 3, 5)] == [0, 0, 0]
    assert per_unit["num_heads"] == 1  # read by the check of the scores


def pruned(kind: str) -> tuple[nn.Module, Structure]:
    model: Any = forwards.model(kind)
    structure = structure_of(model)
    return rebuild(model, structure, halved(structure).groups, forwards.inputs())[0], structure


@pytest.mark.parametrize("kind", forwards.FORWARDS)
def test_it_is_exported_with_a_batch_and_a_length_that_vary(kind: str) -> None:
    dense, _ = pruned(kind)
    axes = {"x": {0: torch.export.Dim("batch", max=9), 1: torch.export.Dim("tokens", min=3, max=32)}}
    program = torch.export.export(dense, (), forwards.inputs(), dynamic_shapes=axes).module()
    for rows, tokens in ((2, 3), (5, 20)):
        x = forwards.inputs(rows, tokens)
        torch.testing.assert_close(program(**x), dense(**x), rtol=1e-5, atol=1e-6)


def test_it_is_copied_and_pickled() -> None:
    dense, _ = pruned("InputWidth")
    attention: Any = dense.get_submodule("blocks.0.attention")
    assert type(attention).__name__ == "InputWidth" and isinstance(attention, forwards.InputWidth)
    x = forwards.inputs()
    for other in (copy.deepcopy(dense), pickle.loads(pickle.dumps(dense))):
        assert type(other.get_submodule("blocks.0.attention")) is type(attention)
        torch.testing.assert_close(other(**x), dense(**x), rtol=0, atol=0)


def test_another_copy_keeps_its_own_sizes() -> None:
    model: Any = forwards.model("InputWidth")
    before = model(**forwards.inputs())
    structure = structure_of(model)
    rebuild(model, structure, halved(structure).groups, forwards.inputs())
    assert type(model.get_submodule("blocks.0.attention")) is forwards.InputWidth
    assert torch.equal(model(**forwards.inputs()), before)


def test_saved_units_hold_the_sizes() -> None:
    model: Any = forwards.model("MergedBatch")
    structure = structure_of(model)
    units = saved_units(structure)
    assert units is not None
    loaded = SavedUnits.model_validate(json.loads(units.model_dump_json())).structure(model, structure.family)
    plan = halved(structure)
    dense, again = (rebuild(model, one, plan.groups, forwards.inputs())[0] for one in (structure, loaded))
    assert torch.equal(again(**forwards.inputs()), dense(**forwards.inputs()))


@pytest.mark.parametrize(
    ("name", "is_one"),
    [
        ("blocks.0.(reshape 0 3)", True),
        ("(split 12 0)", True),
        ("(expand 0 1 whole)", True),
        ("blocks.0.num_heads", False),
        ("(call 1 2)", False),
        ("blocks.(reshape -1 0)", False),
        ("blocks.(reshape 0 3) ", False),
    ],
)
def test_names_of_sizes_in_code(name: str, is_one: bool) -> None:
    assert is_code_size(name) is is_one


class Sized(nn.Module):
    def __init__(self, run: Any) -> None:
        super().__init__()
        self.run = run

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.run(x)


#: The code, {size: its value per unit}, the result's shape for two units.
WAYS: list[tuple[Callable[[torch.Tensor], torch.Tensor], dict[str, int], tuple[int, ...]]] = [
    (lambda x: x.reshape(3, 4), {"reshape 0 1": 4}, (3, 8)),
    (lambda x: x.reshape((3, 4)), {"reshape 0 1": 4}, (3, 8)),
    (lambda x: torch.reshape(x, (3, 4)), {"reshape 0 1": 4}, (3, 8)),
    (lambda x: torch.reshape(x, shape=[3, 4]), {"reshape 0 1": 0}, (3, 8)),
    (lambda x: x.view(torch.float32).view(3, 4), {"reshape 0 1": 4}, (3, 8)),
    (lambda x: x.mT.view(2, 6), {"reshape 0 1": 0}, (2, 12)),
    (lambda x: x.unflatten(1, (2, 3)), {"unflatten 0 1": 2}, (3, 2, 4)),
    (lambda x: torch.unflatten(x, -1, [2, 3]), {"unflatten 0 0": 2, "unflatten 0 1 whole": 2}, (3, 4, 2)),
    (lambda x: x[:, :1].expand(3, 2), {"expand 0 1": 3}, (3, 6)),
    (lambda x: x.split(2, -1)[0], {"split 0 0": 2}, (3, 4)),
    (lambda x: torch.split(x, [2, 4], dim=1)[1], {"split 0 0": 3, "split 0 1 whole": 2}, (3, 2)),
]


@pytest.mark.parametrize(("run", "sizes", "shape"), WAYS)
def test_every_way_to_give_a_size(
    run: Callable[[torch.Tensor], torch.Tensor], sizes: dict[str, int], shape: tuple[int, ...]
) -> None:
    module: Any = Sized(run)
    for name, per_unit in sizes.items():
        replace_size(module, f"({name})", per_unit, 2)
    assert module(torch.randn(3, 8)).shape == shape


def test_calls_of_the_first_pass_alone_are_not_counted() -> None:
    """A loaded model computes its indices again, for which the measured one had kept them."""
    dense: Any = pruned("KeepsIndices")[0]
    x = forwards.inputs()
    wanted = dense(**x)
    dense.blocks[0].attention.kept = torch.zeros(0)
    torch.testing.assert_close(dense(**x), wanted, rtol=0, atol=0)
