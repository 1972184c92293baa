"""Found units are removed only where the rebuilt model is the masked one, whatever plan comes later."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from optin_export.errors import InputError
from optin_export.models import build
from optin_export.pruning import rebuild, verified
from optin_export.units import Structure, count_macs, count_params, find_structure, masked, measure_costs
from optin_export.units.discovery import found_structure
from optin_export.units.trace import observe_pass
from tests.pruning.unknown import EVERY, unknown
from tests.repair.plans import halved
from tests.units.builders import from_python
from tests.units.discover import branches, nets

#: net -> kinds of its units.
TOKENS: dict[str, tuple[Callable[[], nn.Module], set[str]]] = {
    "neurons": (nets.feed_forward, {"neurons"}),
    "separate": (nets.attention, {"heads", "neurons"}),
    "fused": (lambda: nets.fused_attention(False), {"heads", "neurons"}),
    "interleaved": (lambda: nets.fused_attention(True), {"heads", "neurons"}),
    "grouped queries": (lambda: nets.grouped_queries(3), {"heads", "neurons"}),
    "multi-query": (lambda: nets.grouped_queries(1), {"heads", "neurons"}),
    "gated": (lambda: nets.gated(False), {"neurons"}),
    "fused gate": (lambda: nets.gated(True), {"neurons"}),
    "called twice": (nets.called_twice, {"neurons"}),
    "dead ReLU": (nets.dead_relu, {"neurons"}),
    "norm per head": (lambda: nets.normed(True), {"heads", "neurons"}),
    "tables": (nets.with_tables, {"heads", "neurons"}),
    "residual": (nets.residual, {"neurons"}),
}
IMAGES: dict[str, tuple[Callable[[], nn.Module], set[str]]] = {
    "in place": (nets.in_place, {"channels"}),
    "depthwise": (lambda: nets.convolutions(6), {"channels"}),
    "grouped": (lambda: nets.convolutions(2), {"channels"}),
    "gate": (nets.squeeze_excitation, {"channels"}),
    "flattened": (nets.flattened, {"channels", "neurons"}),
    "two branches": (branches.fire, {"channels"}),
    "dense blocks": (branches.dense, {"channels"}),
    "flattened branches": (branches.flattened_branches, {"channels", "neurons"}),
    "gated branches": (branches.gated_branches, {"channels"}),
    "transposed": (branches.upsampled, {"channels"}),
    "transposed, overlapping": (branches.sounds, {"channels"}),
    "volumes": (branches.volumes, {"channels"}),
    "resolutions": (branches.stages, {"heads"}),
}
#: net -> layers that must be among those that read units last.
CONSUMERS = {
    "two branches": ("three", "last", "head"),
    "dense blocks": ("head",),
    "flattened branches": ("fc", "head"),
    "gated branches": ("excite", "last", "head"),
    "transposed": ("up", "last", "head"),
    "transposed, overlapping": ("up", "head"),
    "volumes": ("conv2", "head"),
    "resolutions": ("blocks.0.proj", "blocks.1.proj", "blocks.2.proj"),
}
#: Of the models of transformers, the ones that the core suite checks.
CORE = {"modernbert", "phi3", "albert"}

NET = """
import torch
from torch import nn


class Windowed(nn.Module):
    def __init__(self):
        super().__init__()
        self.num_heads = self.window = 4  # the same by chance
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x):
        rows = self.qkv(x).unflatten(1, (-1, self.window))  # [batch, windows, tokens, features]
        q, k, v = rows.unflatten(3, (3, self.num_heads, -1)).permute(3, 0, 1, 4, 2, 5)
        mixed = (q @ k.mT).softmax(-1) @ v
        return x + self.proj(mixed.transpose(2, 3).flatten(3).flatten(1, 2))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches, self.head = nn.Conv2d(3, 16, 4, 4), nn.Linear(16, 5)
        self.blocks = nn.ModuleList(Windowed() for _ in range(2))

    def forward(self, x):
        x = self.patches(x).flatten(2).mT
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


def net():
    torch.manual_seed(0)
    return Net().eval()
"""


def found(model: Any, inputs: nets.Inputs) -> Structure:
    return found_structure(model, inputs, observe_pass(model, inputs), None)


def check_plans(model: Any, structure: Structure, inputs: nets.Inputs) -> None:
    """Five random plans: the dense model is the masked one, and costs what was predicted."""
    one = {name: tensor[:1] for name, tensor in inputs.items()}
    costs = measure_costs(model, structure, one)
    for seed, share in enumerate((0.5, 0.2, 0.8, 0.3, 0.6)):
        plan = halved(structure, share, seed)
        dense, _ = rebuild(model, structure, plan.groups, inputs)
        masks = {group.key: torch.zeros(group.count) for group in structure.groups}
        for group in structure.groups:
            masks[group.key][list(plan.groups[group.key].kept)] = 1
        with torch.no_grad(), masked(model, structure.groups, masks):
            wanted = model(**inputs)
        torch.testing.assert_close(dense(**inputs), wanted, atol=1e-5 * float(wanted.abs().max()), rtol=0)
        kept = {key: len(group.kept) for key, group in plan.groups.items()}
        assert costs.of("macs", kept) == count_macs(dense, one)
        assert costs.of("params", kept) == count_params(dense)


def attributes(structure: Structure) -> dict[str, int]:
    return {name: per_unit for group in structure.groups for name, per_unit in group.sizes}


@pytest.mark.parametrize("name", [*TOKENS, *IMAGES])
def test_every_plan_of_an_own_module_is_exact(name: str) -> None:
    make, kinds = (TOKENS | IMAGES)[name]
    model, inputs = make(), nets.images() if name in IMAGES else nets.tokens()
    structure = found(model, inputs)
    checked = verified(model, structure, inputs)
    assert {group.kind for group in checked.groups} == kinds
    assert len(checked.groups) == len(structure.groups)
    assert not checked.refused
    assert {group.consumer for group in checked.groups} >= set(CONSUMERS.get(name, ()))
    check_plans(model, checked, inputs)


@pytest.mark.parametrize("name", [pytest.param(one, marks=() if one in CORE else pytest.mark.slow) for one in EVERY])
def test_every_plan_of_a_model_that_no_family_knows_is_exact(name: str) -> None:
    model, inputs = unknown(name)
    checked = verified(model, found(model, inputs), inputs)
    assert {"heads", "neurons"} <= {group.kind for group in checked.groups}
    check_plans(model, checked, inputs)


def test_parts_of_a_split_go_together() -> None:
    """Unit i of the joined group is channel i of every part; the last layer's own channels can go alone."""
    model, inputs = branches.parts(), nets.images()
    structure = found(model, inputs)
    checked = verified(model, structure, inputs)
    assert len(structure.groups) == 5
    assert [(group.count, group.sizes, group.reads) for group in checked.groups] == [
        (4, (), ("expand",)),
        (4, (("size", 1),), ("expand", "conv1", "conv2")),
        (4, (), ("head",)),
    ]
    assert not checked.refused
    check_plans(model, checked, inputs)


def test_sizes_in_a_list_are_those_of_each_part() -> None:
    model, inputs = branches.listed_parts(), nets.images()
    checked = verified(model, found(model, inputs), inputs)
    assert [(group.producers[1].path, group.sizes) for group in checked.groups if len(group.producers) > 1] == [
        ("three", (("sizes.0", 1),)),
        ("five", (("sizes.1", 1),)),
    ]
    assert not checked.refused
    check_plans(model, checked, inputs)


def test_costs_outside_the_layers_are_those_of_each_resolution() -> None:
    model, inputs = branches.stages(), nets.images()
    costs = [group.outside for group in verified(model, found(model, inputs), inputs).groups if group.kind == "heads"]
    assert costs == [2 * 36 * 4, 2 * 18 * 4, 2 * 6 * 4]  # k^T v and q (k^T v): 2 * positions * 2 * 2


def test_a_factor_that_is_zero_does_not_hide_what_it_multiplies() -> None:
    """With gamma at zero no channel depends on the others, until training changes it."""
    for gamma in (0.0, 0.3):
        model, inputs = branches.zero_norm(gamma), nets.images()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        checked = verified(model, found(model, inputs), inputs)
        assert [group.consumer for group in checked.groups] == ["head"]
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_sizes_are_the_attributes_that_must_change() -> None:
    """`others` equals the number of heads by chance, and `eight` twice that; the model reads neither."""
    model, inputs = nets.attention(heads=4, others=4, eight=8), nets.tokens()
    assert attributes(verified(model, found(model, inputs), inputs)) == {"heads": 1}


def test_the_number_of_key_heads_changes_with_that_of_query_heads() -> None:
    model, inputs = nets.grouped_queries(3), nets.tokens()
    assert attributes(verified(model, found(model, inputs), inputs)) == {"groups": 1, "heads": 2}


def test_keys_that_all_heads_share_stay() -> None:
    model, inputs = nets.grouped_queries(1), nets.tokens()
    assert attributes(verified(model, found(model, inputs), inputs)) == {"heads": 1}


def damaged(structure: Structure, consumer: str, **fields: Any) -> Structure:
    groups = [
        dataclasses.replace(group, **fields) if group.consumer == consumer else group for group in structure.groups
    ]
    return dataclasses.replace(structure, groups=tuple(groups))


def group_of(structure: Structure, consumer: str) -> Any:
    return next(group for group in structure.groups if group.consumer == consumer)


def refusal_of(model: Any, structure: Structure, inputs: nets.Inputs, consumer: str) -> str:
    checked = verified(model, structure, inputs)
    assert consumer not in {group.consumer for group in checked.groups}
    (refusal,) = checked.refused
    assert f"'{consumer}'" in refusal.error.what
    return refusal.error.why


def test_wrong_rows_are_refused() -> None:
    model, inputs = nets.feed_forward(), nets.tokens()
    structure = found(model, inputs)
    (producer,) = group_of(structure, "fc2").producers
    wrong = dataclasses.replace(producer, rows=None, index=((1,), (0,), (2,), (3,), (4,), (5,)))
    why = refusal_of(model, damaged(structure, "fc2", producers=(wrong,)), inputs, "fc2")
    assert "differs from the masked one" in why


def test_a_missing_table_is_refused() -> None:
    model, inputs = nets.with_tables(), nets.tokens()
    structure = found(model, inputs)
    tables = group_of(structure, "proj").tables
    assert {table.path for table in tables} == {"positions", "temperature"}
    why = refusal_of(model, damaged(structure, "proj", tables=tables[:1]), inputs, "proj")
    assert "the model does not run" in why or "differs from the masked one" in why


def test_a_missing_producer_is_refused() -> None:
    model, inputs = nets.gated(False), nets.tokens()
    structure = found(model, inputs)
    producers = group_of(structure, "down").producers
    why = refusal_of(model, damaged(structure, "down", producers=producers[:1]), inputs, "down")
    assert "the model does not run" in why


def test_sizes_that_are_no_arguments_of_an_operation_leave_the_heads_whole() -> None:
    """The number of heads stands in the code, and a tensor of that size is made from nothing."""
    model, inputs = nets.constant_heads(), nets.tokens()
    why = refusal_of(model, found(model, inputs), inputs, "proj")
    assert "the model does not run" in why or "differs from the masked one" in why


def test_an_order_of_features_that_the_code_fixes_is_refused() -> None:
    model, inputs = nets.permuted(), nets.tokens()
    assert "index out of range" in refusal_of(model, found(model, inputs), inputs, "fc2")


def test_nothing_left_is_an_error_with_the_reason() -> None:
    model, inputs = nets.permuted(), nets.tokens()
    structure = found(model, inputs)
    only = dataclasses.replace(structure, groups=(group_of(structure, "fc2"),))
    with pytest.raises(InputError, match="nothing to prune") as error:
        verified(model, only, inputs)
    assert "'fc2'" in error.value.why


def test_declared_groups_are_taken_as_they_are() -> None:
    model, inputs = nets.permuted(), nets.tokens()
    structure = found(model, inputs)
    declared = dataclasses.replace(
        structure, groups=tuple(dataclasses.replace(group, found=False) for group in structure.groups)
    )
    assert verified(model, declared, inputs) is declared


def test_an_attribute_that_equals_the_number_of_heads_by_chance_stays(tmp_path: Path) -> None:
    file = tmp_path / "net.py"
    file.write_text(NET)
    description = from_python(file, "net")()
    model = build({**description, "task": "image-classification", "pooling": None, "normalize": False}, True)
    inputs = {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))}
    structure = verified(model, find_structure(model, inputs=inputs), inputs)
    assert [(group.kind, group.count, group.sizes) for group in structure.groups] == [
        ("heads", 4, ((f"model.blocks.{number}.num_heads", 1),)) for number in (0, 1)
    ]
