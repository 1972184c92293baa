"""Measurement finds what families declare: the same layers, units, rows, costs and residual streams.

The tables at the top are what families know beyond that.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

from optin_export.errors import InputError
from optin_export.models import wrap
from optin_export.models.tasks import TaskModel
from optin_export.pruning import verified
from optin_export.pruning.rebuild import rebuild
from optin_export.units import (
    Structure,
    UnitGroup,
    captured,
    find_structure,
    get_scale,
    measure_costs,
    supported,
    tensor_of,
)
from optin_export.units.discover import groups
from optin_export.units.discover.groups import CONSTANT, discover_groups
from optin_export.units.discovery import found_structure
from optin_export.units.trace import observe_pass
from tests.repair.plans import halved
from tests.units.discover import nets
from tests.units.models import MODELS, UNITS, inputs_for, small_model
from tests.units.test_families import FIRST, by_tier

#: Families whose attention lists its heads, to read a table of all blocks: a buffer, without gradient.
LISTED = {"mpnet"}
#: Models whose declared neurons are made and read by convolutions of one position: measurement names them channels.
POINTWISE = {"convnext-conv-mlp"}
#: Families with attention in windows: their residual stream is cut into windows by the block's own code.
WINDOWS = {"swin", "swin-transformers", "mask2former"}
#: Models whose shortcut adds channels of zeros by a function, and whose sum no module reads.
PADDED = {"resnet-cifar": {"block01.channels", "block02.channels"}}
#: Models whose size attributes are found in minutes: many modules around each layer.
MANY = {"mask2former"}


class Compared:
    """A model with what its family declares and what is found, and the found group of each declared one."""

    def __init__(self, name: str) -> None:
        self.name, self.family = name, MODELS[name][0]
        self.model, _ = small_model(name)
        _vary_scales(self.model)
        self.inputs = inputs_for(self.model, 2, 0)
        self.declared = find_structure(self.model, inputs=self.inputs)
        seen = observe_pass(self.model, self.inputs)
        self.found = found_structure(self.model, self.inputs, seen, None)
        by_layer = {group.consumer: group for group in self.found.groups}
        self.pairs = [(group, by_layer[group.consumer]) for group in self.declared.groups]

    def by_declared(self, structure: Structure) -> Structure:
        """The structure with the declared groups only, under their keys."""
        by_layer = {group.consumer: group for group in structure.groups}
        groups = tuple(
            dataclasses.replace(by_layer[one.consumer], block=one.block, part=one.part, kind=one.kind)
            for one in self.declared.groups
        )
        return dataclasses.replace(structure, blocks=self.declared.blocks, groups=groups)


@torch.no_grad()
def _vary_scales(model: TaskModel) -> None:
    """Layer scales begin as constants: a stream is found with any of them."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            own = not type(module).__module__.startswith("torch.nn.")
            if own and parameter.numel() == max(parameter.shape) > 1 and parameter.unique().numel() == 1:
                parameter.mul_(1 + 0.1 * torch.rand(parameter.shape, generator=generator))


@pytest.fixture(scope="module", params=by_tier(FIRST, *MODELS, others=pytest.mark.slow))
def case(request: pytest.FixtureRequest) -> Compared:
    return Compared(request.param)


def rows(group: UnitGroup) -> dict[str, list[list[int]]]:
    return {one.path: [group.rows_of(one, [unit]) for unit in range(group.count)] for one in group.producers}


def entries(group: UnitGroup) -> dict[tuple[str, int], list[list[int]]]:
    return {(one.path, one.dim): [group.entries_of(one, [unit]) for unit in range(group.count)] for one in group.tables}


def test_all_families_and_kinds_are_compared() -> None:
    assert {MODELS[name][0] for name in FIRST} == {family.name for family in supported()}
    kinds = {group.split(".")[1].rstrip("0123456789") for name in FIRST for group in UNITS.get(name, {})}
    assert kinds >= {"heads", "neurons", "channels"}


def test_the_same_units_are_found(case: Compared) -> None:
    for group, same in case.pairs:
        assert (same.count, same.width) == (group.count, group.width), group.key
        assert same.kind == ("channels" if case.name in POINTWISE else group.kind), group.key
        assert rows(same) == rows(group), group.key
        assert {one.path: one.fused for one in same.producers} == {one.path: one.fused for one in group.producers}
        assert all(one.index is None for one in same.producers), group.key
        assert {one.path: one.norm for one in same.producers} == {one.path: one.norm for one in group.producers}
        assert set(same.readers) == set(group.readers), group.key
        assert entries(same) == ({} if case.family in LISTED else entries(group)), group.key


def test_they_are_found_in_the_same_order(case: Compared) -> None:
    declared = [group.consumer for group in case.declared.groups]
    assert [group.consumer for group in case.found.groups if group.consumer in declared] == declared


def test_the_same_residual_streams_are_found(case: Compared) -> None:
    """By value: a stream can be read at several modules."""
    for group, same in case.pairs:
        if group.key in PADDED.get(case.name, ()) or (case.family in WINDOWS and group.residual[1:] == ("call",)):  # type: ignore[index]
            assert same.residual is None or _is_whole(case, same), group.key
            continue
        assert (same.residual is None) == (group.residual is None), group.key
        assert same.arrange is group.arrange, group.key
        assert (same.scale is None) == (group.scale is None), group.key
        if group.residual is not None and same.residual is not None:
            assert torch.equal(_stream(case, same), _stream(case, group)), group.key
        if group.scale is not None and same.scale is not None:
            one, other = get_scale(case.model, same.scale), get_scale(case.model, group.scale)
            assert one is other or torch.equal(one, other), group.key  # type: ignore[arg-type]


def _is_whole(case: Compared, group: UnitGroup) -> bool:
    """A window as large as what is left: nothing is cut."""
    return case.family in WINDOWS and _stream(case, group).dim() == 3


def _stream(case: Compared, group: UnitGroup) -> torch.Tensor:
    point: Any = group.residual
    with captured(case.model, [point]) as seen, torch.no_grad():
        case.model(**case.inputs)
    (value,) = seen[point]
    return tensor_of(value)


def test_a_cut_by_measured_rows_gives_the_declared_model(case: Compared) -> None:
    """Weight by weight; with the declared sizes, as those are found later, by trial."""
    sizes = {group.key: (group.sizes, group.tables) for group in case.declared.groups}
    found = case.by_declared(case.found)
    known = [dataclasses.replace(one, sizes=sizes[one.key][0]) for one in found.groups]
    if case.family in LISTED:
        known = [dataclasses.replace(one, tables=sizes[one.key][1]) for one in known]
    plan = halved(case.declared)
    expected, _ = rebuild(case.model, case.declared, plan.groups, case.inputs)
    dense, _ = rebuild(case.model, dataclasses.replace(found, groups=tuple(known)), plan.groups, case.inputs)
    got, wanted = dense.state_dict(), expected.state_dict()
    assert got.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(got[name], wanted[name])] == []


@pytest.mark.parametrize(
    "case", by_tier(("bert", "gpt2", "llama", "vit", "vgg-bn"), *MODELS, others=pytest.mark.nightly), indirect=True
)
def test_verified_units_have_the_declared_costs(case: Compared) -> None:
    """And no more sizes change than are declared."""
    if case.name in MANY:
        pytest.skip("finding its sizes takes minutes")
    found = verified(case.model, case.by_declared(case.found), case.inputs)
    assert [group.key for group in found.groups] == [group.key for group in case.declared.groups]
    for group, same in zip(case.declared.groups, found.groups, strict=True):
        assert set(same.sizes) <= set(group.sizes), group.key
    one = {name: tensor[:1] for name, tensor in case.inputs.items()}
    declared, measured = measure_costs(case.model, case.declared, one), measure_costs(case.model, found, one)
    for share in (0.25, 0.75):
        kept = {key: len(group.kept) for key, group in halved(case.declared, share).groups.items()}
        for kind in ("macs", "params"):
            assert declared.of(kind, kept) == measured.of(kind, kept)  # type: ignore[arg-type]


def test_rows_are_named_one_by_one_only_where_they_are_no_slabs() -> None:
    def producer(model: nets.Net) -> tuple[int, int | None, bool]:
        inputs = nets.tokens()
        structure = found_structure(model, inputs, observe_pass(model, inputs), None)
        one = structure.groups[0].producers[0]
        return one.fused, one.rows, one.index is not None

    assert producer(nets.fused_attention(interleaved=False)) == (3, 2, False)
    assert producer(nets.fused_attention(interleaved=True)) == (1, 6, False)
    assert producer(nets.permuted()) == (1, None, True)


def test_layers_that_no_row_reaches_have_no_units() -> None:
    """As those of a table of relative positions in Swin v2: removing their units would save nothing in an engine."""
    model = nets.net(
        lambda s, x: s.head(s.norm(s.fc2(s.fc1(x).relu()) + s.table2(s.table1(s.places).relu()))),
        norm=nn.LayerNorm(nets.WIDTH),
        places=nn.Parameter(torch.zeros(nets.TOKENS, 2)),
        table1=nn.Linear(2, 6),
        table2=nn.Linear(6, nets.WIDTH),
        fc1=nn.Linear(nets.WIDTH, 8),
        fc2=nn.Linear(8, nets.WIDTH),
        head=nn.Linear(nets.WIDTH, 3),
    )
    structure = found_structure(model, nets.tokens(), None, None)
    assert [group.consumer for group in structure.groups] == ["fc2"]
    assert [("'table2'" in one.error.what, one.error.why == CONSTANT) for one in structure.refused] == [(True, True)]


def test_a_zero_is_no_residual_stream() -> None:
    """Such as position embeddings before training: added to a layer's output they leave it as it is."""
    model = nets.net(
        lambda s, x: s.head(s.norm(s.fc2(s.fc1(s.places(torch.zeros_like(x)) + x).relu()))),
        places=nn.Identity(),
        fc1=nn.Linear(nets.WIDTH, 8),
        fc2=nn.Linear(8, nets.WIDTH),
        norm=nn.Identity(),
        head=nn.Linear(nets.WIDTH, 3),
    )
    structure = found_structure(model, nets.tokens(), None, None)
    assert [group.residual for group in structure.groups if group.consumer == "fc2"] == [None]


class OnlyInTraining(torch.autograd.Function):
    """A step whose own backward pass asserts what does not hold for a model that serves."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        raise AssertionError("use model.train()")


def test_a_models_own_backward_pass_that_fails_is_no_bug_of_ours() -> None:
    parts = {"up": nn.Linear(nets.WIDTH, 16), "down": nn.Linear(16, nets.WIDTH)}
    made = nets.net(lambda net, x: x + net.down(OnlyInTraining.apply(torch.relu(net.up(x)))), **parts)
    with pytest.raises(InputError, match=r"AssertionError: use model\.train\(\)"):
        discover_groups(made, nets.tokens())


def test_an_error_of_our_own_stays_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups, "inner", groups._blocks)  # which takes other arguments
    with pytest.raises(TypeError):
        discover_groups(nets.net(lambda net, x: net.up(x), up=nn.Linear(nets.WIDTH, 4)), nets.tokens())


class StreamAlone(torch.nn.Module):
    """Every channel is part of a sum that a later layer reads; nothing lies between two layers alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 8, 3, padding=1)
        self.head = torch.nn.Linear(8, 5)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        x = self.first(pixel_values).relu()
        return self.head((self.second(x) + x).relu().mean((2, 3)))  # type: ignore[no-any-return]


def test_a_model_of_residual_streams_alone_is_refused_for_this_reason() -> None:
    model = wrap(StreamAlone().eval(), "image-classification")
    with pytest.raises(InputError, match="nothing to prune") as caught:
        find_structure(model, inputs={"pixel_values": torch.randn(2, 3, 8, 8)})
    assert caught.value.why == (
        "the units that 'model.head' reads cannot be removed: they are channels of a residual stream"
    )
