"""Fewer dimensions of queries and keys: the best change of a rank, an exact rebuild, its costs, and its curves."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from optin_export.errors import InputError
from optin_export.models import TaskModel
from optin_export.models.equivalents import NarrowAttention
from optin_export.pruning import difference, load_model, narrow, narrowable, rebuild, save_model
from optin_export.repair import RepairSettings, apply_plan, loss_curves
from optin_export.repair.query_keys import of_lower_rank
from optin_export.units import (
    QueryKeys,
    Structure,
    count_macs,
    count_params,
    find_query_keys,
    find_structure,
    get_layer,
    get_module,
    measure_costs,
)
from tests.repair.plans import plan_of
from tests.units.models import batches_for, inputs_for, small_model


@pytest.fixture(scope="module")
def vit() -> tuple[TaskModel, Structure]:
    model, _ = small_model("vit")
    structure = find_structure(model)
    return model, dataclasses.replace(structure, attentions=find_query_keys(model, structure))


def test_no_other_rank_r_change_is_nearer_to_the_scores() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, 6, 9, generator=generator, dtype=torch.float64) for _ in range(2))
    rows = (
        torch.randn(400, 9, generator=generator, dtype=torch.float64) @ torch.randn(9, 9, generator=generator).double()
    )
    rows[:, -1] = 1.0
    gram, centred = rows.T @ rows / 400, (rows - rows.mean(0)).T @ (rows - rows.mean(0)) / 400

    def error(other: torch.Tensor) -> float:
        change = (query - other).mT @ key  # [heads, inputs, inputs]
        return float(torch.einsum("hij,ik,hkl,jl->", change, gram, change, centred))

    for count, found in zip((1, 3, 5), of_lower_rank(query, key, gram, (1, 3, 5)), strict=True):
        assert torch.linalg.matrix_rank(found, rtol=1e-6).tolist() == [count, count]
        least = error(found)
        # The bound of Eckart and Young, from the singular values themselves.
        half, other = (
            torch.linalg.cholesky(one + 1e-12 * torch.eye(9)) for one in (gram, centred + 1e-9 * torch.eye(9))
        )
        sizes = torch.linalg.svdvals(half.mT @ query.mT @ key @ other)
        assert least == pytest.approx(float(sizes[:, count:].square().sum()), rel=1e-3)
        for _ in range(20):
            basis = torch.linalg.qr(torch.randn(2, 6, count, generator=generator, dtype=torch.float64))[0]
            assert error(basis @ (basis.mT @ query)) >= least


def test_with_all_dimensions_queries_stay() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, 4, 9, generator=generator, dtype=torch.float64) for _ in range(2))
    (found,) = of_lower_rank(query, key, torch.eye(9).double() + 0.1, [4])
    torch.testing.assert_close(found, query)


def test_attentions_are_those_without_a_norm_of_queries_and_keys(vit: tuple[TaskModel, Structure]) -> None:
    model, structure = vit
    assert [one.path for one in structure.attentions] == [f"model.blocks.{block}.attn" for block in range(3)]
    assert {one.count for one in structure.attentions} == {8}
    changed = copy.deepcopy(model)
    get_module(changed, "model.blocks.1.attn").q_norm = torch.nn.LayerNorm(8)  # type: ignore[assignment]
    assert [one.block for one in find_query_keys(changed, structure)] == [0, 2]


@pytest.mark.parametrize("name", ["bert", "roberta", "mpnet", "distilbert", "vit-transformers", "dinov2"])
def test_with_all_dimensions_every_family_computes_the_same(name: str) -> None:
    model, _ = small_model(name)
    inputs, structure = inputs_for(model, 3, 0), find_structure(model)
    found = narrowable(model, find_query_keys(model, structure), inputs)
    assert len(found) == 3
    with torch.no_grad():
        wanted = model(**inputs)
        narrow(model, found, {one.name: one.count for one in found})
        torch.testing.assert_close(model(**inputs), wanted, rtol=1e-4, atol=1e-5)
        narrow(model := small_model(name)[0], found, {one.name: 2 for one in found})
        assert (model(**inputs) - wanted).abs().max() > 1e-3


def test_an_attention_that_computes_something_else_is_left_as_it_is(vit: tuple[TaskModel, Structure]) -> None:
    model, structure = copy.deepcopy(vit[0]), vit[1]
    inputs, changed = inputs_for(model, 2, 0), get_module(model, "model.blocks.1.attn")
    changed.register_forward_hook(lambda module, args, output: 2 * output)
    wanted = model(**inputs)
    assert [one.block for one in narrowable(model, structure.attentions, inputs)] == [0, 2]
    assert get_module(model, "model.blocks.1.attn") is changed
    torch.testing.assert_close(model(**inputs), wanted)


def reduce_rank(model: TaskModel, one: QueryKeys, count: int) -> None:
    """Set the queries' rows of rank `count`, of all heads."""
    layer = get_layer(model, one.query)
    rows = one.rows(len(layer.weight), "query")
    both = torch.cat([layer.weight, layer.bias[:, None]], 1)[rows].unflatten(0, (-1, one.count))
    u, sizes, v = torch.linalg.svd(both, full_matrices=False)
    sizes[:, count:] = 0
    smaller = ((u * sizes[:, None]) @ v).flatten(0, 1)
    layer.weight.data[rows], layer.bias.data[rows] = smaller[:, :-1], smaller[:, -1]


def test_a_narrow_attention_computes_the_same_as_queries_of_that_rank(vit: tuple[TaskModel, Structure]) -> None:
    model, structure = vit
    given, inputs = structure.attentions[1], inputs_for(model, 3, 0)
    low = copy.deepcopy(model)
    reduce_rank(low, given, 3)
    dense = copy.deepcopy(low)
    narrow(dense, structure.attentions, {given.name: 3})
    attention = get_module(dense, given.path)
    assert isinstance(attention, NarrowAttention) and attention.qkv.out_features == 4 * (3 + 3 + 8)
    with torch.no_grad():
        torch.testing.assert_close(dense(**inputs), low(**inputs), rtol=1e-4, atol=1e-5)
        assert (dense(**inputs) - model(**inputs)).abs().max() > 1e-3


def test_a_plan_for_other_attentions_is_refused(vit: tuple[TaskModel, Structure]) -> None:
    model, structure = vit
    for wrong in ({"block07.dimensions": 4}, {"block00.dimensions": 9}):
        with pytest.raises(InputError, match="the plan is not for this model"):
            narrow(copy.deepcopy(model), structure.attentions, wrong)


def test_costs_are_those_of_the_smaller_model(vit: tuple[TaskModel, Structure]) -> None:
    model, structure = vit
    one = inputs_for(model, 1, 0)
    costs = measure_costs(model, structure, one)
    kept = {"block00.heads": 3, "block00.dimensions": 2, "block01.dimensions": 5, "block02.neurons": 40}
    plan = plan_of(structure, {key: list(range(count)) for key, count in kept.items() if "dim" not in key})
    dense, _ = rebuild(model, structure, plan.groups, inputs_for(model, 2, 0))
    narrow(dense, structure.attentions, {"block00.dimensions": 2, "block01.dimensions": 5})
    assert costs.of("macs", kept) == count_macs(dense, one)
    assert costs.of("params", kept) == count_params(dense)
    assert costs.macs == count_macs(model, one)


def test_the_repaired_model_is_nearer_than_with_dimensions_at_random(
    vit: tuple[TaskModel, Structure], tmp_path: Path
) -> None:
    model, structure = vit
    batches, inputs = batches_for(model, 12, size=8), inputs_for(model, 2, 0)
    fewer = {one.name: 3 for one in structure.attentions}
    plan = plan_of(structure, {}).model_copy(update={"dimensions": fewer})
    settings = RepairSettings(temperature=1.0, seed=0)
    found = apply_plan(model, structure, plan, batches, inputs, settings).dense
    other = copy.deepcopy(model)
    for one in structure.attentions:
        layer = get_layer(other, one.query)
        rows = torch.arange(len(layer.weight) // 3).view(-1, one.count)[:, 3:].flatten()
        layer.weight.data[rows], layer.bias.data[rows] = 0.0, 0.0
    held_out = batches_for(model, 14, size=8)[12:]
    with torch.no_grad():
        wanted, near, far = (torch.cat([one(**batch.inputs) for batch in held_out]) for one in (model, found, other))
    assert (near - wanted).square().mean() < 0.2 * (far - wanted).square().mean()
    assert save_model(tmp_path, found, small_model("vit")[1], structure, plan, inputs).dimensions == fewer
    assert difference(load_model(tmp_path), found, inputs) is None


def test_curves_in_bfloat16_are_those_of_single_precision(vit: tuple[TaskModel, Structure]) -> None:
    """Up to the rounding of their passes: the losses that are measured besides are in single precision."""
    model, structure = vit
    batches = batches_for(model, 6, size=8)
    scores = {group.key: np.arange(group.count, dtype=float) for group in structure.groups}
    least = {group.key: 1 for group in structure.searched_groups}
    single, short = (
        loss_curves(model, structure, scores, batches, batches[:2], RepairSettings(seed=0, autocast=dtype), least=least)
        for dtype in (None, "bfloat16")
    )
    for key, curve in single.items():
        largest = curve[:, 1:].max(0)
        assert (np.abs(short[key][:, 1:] - curve[:, 1:]) <= 0.1 * curve[:, 1:] + 1e-3 * largest).all(), key
        assert (short[key][:-1, 1:] != curve[:-1, 1:]).any()


def test_curves_are_the_losses_of_the_change(vit: tuple[TaskModel, Structure]) -> None:
    model, structure = vit
    batches = batches_for(model, 6, size=8)
    scores = {group.key: np.arange(group.count, dtype=float) for group in structure.groups}
    least = {group.key: 1 for group in structure.searched_groups}
    curves = loss_curves(
        model, structure, scores, batches, batches[:2], RepairSettings(temperature=1.0, seed=0), least=least
    )
    for one in structure.attentions:
        curve = curves[one.name]
        assert curve[:, 0].tolist() == [1, 2, 3, 4, 5, 6, 7, 8] and curve[-1, 1:].tolist() == [0, 0]
        assert (np.diff(curve[:, 1]) < 0).all() and (curve[:-1, 2] > 0).all()
    without = loss_curves(
        model,
        dataclasses.replace(structure, attentions=()),
        scores,
        batches,
        batches[:2],
        RepairSettings(temperature=1.0, seed=0),
        least=least,
    )
    for key, curve in without.items():
        np.testing.assert_allclose(curve, curves[key], rtol=1e-5, atol=1e-9)
