"""Channels of residual streams: they go from every layer that shares them, and nothing else changes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from optin_export.errors import InputError
from optin_export.pruning.rebuild import rebuild
from optin_export.repair import apply_plan
from optin_export.scoring.activation import activation_scores
from optin_export.scoring.magnitude import magnitude_scores
from optin_export.search import GroupPlan
from optin_export.units import count_macs, count_params, find_structure, get_layer, masked, measure_costs
from tests.repair.plans import halved
from tests.units.models import batches_for, inputs_for, small_model

MODELS = ["resnet-torchvision", "resnet-timm", "resnet-timm-bottleneck"]


@pytest.mark.parametrize("name", MODELS)
def test_every_layer_that_shares_a_stream_is_declared(name: str) -> None:
    model, _ = small_model(name)
    plain, coupled = find_structure(model), find_structure(model, coupled=True)
    streams = [group for group in coupled.groups if group.coupled]
    assert [group for group in coupled.groups if not group.coupled] == list(plain.groups)
    assert len(streams) >= 3 and len({group.key for group in coupled.groups}) == len(coupled.groups)
    for group in streams:
        assert {get_layer(model, path).weight.shape[1] for path in group.reads} == {group.count}
        assert {len(get_layer(model, producer.path).weight) for producer in group.producers} == {group.count}


@pytest.mark.parametrize("name", MODELS)
def test_masked_is_dense_and_costs_what_was_predicted(name: str) -> None:
    model, _ = small_model(name)
    structure, inputs = find_structure(model, coupled=True), inputs_for(model, 3, 5)
    plan = halved(structure, share=0.6)
    dense, smaller = rebuild(model, structure, plan.groups, inputs)
    masks = {}
    for group in structure.groups:
        masks[group.key] = torch.zeros(group.count)
        masks[group.key][list(plan.groups[group.key].kept)] = 1.0
    with torch.no_grad(), masked(model, structure.groups, masks):
        expected = model(**inputs)
    torch.testing.assert_close(dense(**inputs), expected, rtol=1e-4, atol=1e-5)
    one = inputs_for(model, 1, 6)
    costs, kept = measure_costs(model, structure, one), {group.key: group.count for group in smaller.groups}
    assert costs.of("macs", kept) == count_macs(dense, one)
    assert costs.of("params", kept) == count_params(dense)


@pytest.mark.parametrize("name", ["resnet-torchvision", "resnet-timm-bottleneck"])
def test_the_repair_makes_up_for_lost_channels(name: str) -> None:
    model, _ = small_model(name)
    structure = find_structure(model, coupled=True)
    batches, unseen = batches_for(model, 6, size=24), inputs_for(model, 32, 99)
    plan = halved(structure, share=0.8)
    errors = []
    with torch.no_grad():
        wanted = model(**unseen)
        for repair in (False, True):
            dense = apply_plan(model, structure, plan, batches, batches[0].inputs, repair=repair).dense
            errors.append(float((dense(**unseen) - wanted).square().mean()))
    assert errors[1] < 0.9 * errors[0]


def test_scores_look_at_every_reader() -> None:
    """A channel that only a later layer reads is not worthless."""
    model, _ = small_model("resnet-torchvision")
    structure = find_structure(model, coupled=True)
    group = next(group for group in structure.groups if group.coupled and len(group.readers) > 1)
    get_layer(model, group.consumer).weight.data[:, 0] = 0.0
    batches = batches_for(model, 2)
    for scores in (activation_scores(model, structure.groups, batches), magnitude_scores(model, structure)):
        assert scores[group.key][0] > 0


def test_a_stream_that_loses_a_dead_channel_loses_nothing() -> None:
    model, _ = small_model("resnet-torchvision")
    structure, inputs = find_structure(model, coupled=True), inputs_for(model, 4, 3)
    group = next(group for group in structure.groups if group.coupled and len(group.readers) > 1)
    for path in group.reads:
        get_layer(model, path).weight.data[:, 2] = 0.0
    groups = {one.key: GroupPlan(count=one.count, kept=tuple(range(one.count))) for one in structure.groups}
    groups[group.key] = GroupPlan(count=group.count, kept=tuple(unit for unit in range(group.count) if unit != 2))
    dense, _ = rebuild(model, structure, groups, inputs)
    torch.testing.assert_close(dense(**inputs), model(**inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "why"), [("resnet-cifar", "padding"), ("vgg", "has none"), ("vit", "has none")])
def test_models_without_such_streams_are_told_so(name: str, why: str) -> None:
    model, _ = small_model(name)
    with pytest.raises(InputError, match="residual stream") as caught:
        find_structure(model, coupled=True)
    assert why in caught.value.why and "prune.coupled" in caught.value.fix


def test_a_coupled_model_is_rebuilt_from_its_files(tmp_path: Path) -> None:
    from optin_export.pruning import load_model, save_model

    model, architecture = small_model("resnet-torchvision")
    structure, inputs = find_structure(model, coupled=True), inputs_for(model, 2, 4)
    plan = halved(structure, share=0.6)
    operation = apply_plan(model, structure, plan, batches_for(model, 2), inputs, repair=True)
    save_model(tmp_path, operation.dense, architecture, structure, plan, inputs)
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path, trust_python=True)(**inputs), operation.dense(**inputs))
