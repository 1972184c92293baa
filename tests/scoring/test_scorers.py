"""The other scores: one interface, and what they measure."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch

from optin_export.recipe import Budget, PruneSection
from optin_export.scoring import CHANNELS, methods, score
from optin_export.scoring.activation import activation_scores, contributions
from optin_export.scoring.magnitude import magnitude_scores
from optin_export.units import find_structure, get_layer
from tests.scoring.interface import check_scorer
from tests.units.models import batches_for, small_model

METHODS = get_args(PruneSection.model_fields["score"].annotation)


@pytest.mark.parametrize("name", ["bert", "bert-spans", "gpt2", "llama", "vit", "resnet-timm-bottleneck", "vgg"])
@pytest.mark.parametrize("method", METHODS)
def test_methods_share_one_interface(name: str, method: str) -> None:
    check_scorer(name, method)


@pytest.mark.parametrize("name", ["vit", "vgg", "llama"])
def test_magnitude_is_the_square_of_all_weights_that_leave(name: str) -> None:
    model, _ = small_model(name)
    structure = find_structure(model)
    scores = magnitude_scores(model, structure)
    for group in structure.groups:
        consumer = get_layer(model, group.consumer).weight
        width = group.width
        for unit in (0, group.count - 1):
            expected = float(consumer[:, unit * width : (unit + 1) * width].square().sum())
            for producer in group.producers:
                weight = get_layer(model, producer.path).weight
                for slab in range(producer.fused):
                    rows = group.rows_in(producer)
                    start = (slab * group.count + unit) * rows
                    expected += float(weight[start : start + rows].square().sum())
            assert scores[group.key][unit] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["bert", "llama", "vgg", "resnet-cifar"])
def test_activation_is_the_energy_of_what_a_unit_adds(name: str) -> None:
    """The mean square of weight times input per unit, over real tokens only; for a convolution per input pixel."""
    model, _ = small_model(name)
    structure, batches = find_structure(model), batches_for(model, 2, size=3)
    scores, sizes = activation_scores(model, structure.groups, batches), contributions(model, structure.groups, batches)
    for group in structure.groups:
        layer, parts = get_layer(model, group.consumer), []
        for batch in batches:
            seen: list[torch.Tensor] = []
            handle = layer.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0]))
            with torch.no_grad():
                model(**batch.inputs)
            handle.remove()
            inputs = seen[0].movedim(1, -1) if layer.weight.dim() == 4 else seen[0]
            rows = inputs.flatten(0, -2)
            if "attention_mask" in batch.inputs:
                rows = rows[batch.inputs["attention_mask"].flatten().bool()]
            parts.append(rows)
        unit = min(2, group.count - 1)
        columns = slice(unit * group.width, (unit + 1) * group.width)
        added = torch.einsum("of...,rf->ro...", layer.weight[:, columns], torch.cat(parts)[:, columns]).flatten(1)
        assert scores[group.key][unit] == pytest.approx(float(added.square().sum(1).mean()), rel=1e-4)
        assert sizes[group.key].largest[unit] == pytest.approx(float(added.norm(dim=1).max()), rel=1e-4)


def test_auto_takes_what_was_measured_to_keep_most() -> None:
    """Channels of convolutional networks under repair, chosen by loss curves: another score. All else: optin."""
    model, _ = small_model("resnet-timm")
    structure, batches = find_structure(model), batches_for(model, 2, size=2)
    budget = Budget(macs=0.5)
    auto = PruneSection(budget=budget, rows=128, probes=8)
    assert auto.score == "auto" and set(methods(structure, auto).values()) == {CHANNELS}
    other = PruneSection(budget=budget, score=CHANNELS)  # type: ignore[arg-type]
    found, expected = (score(model, structure, batches, one, seed=0).values for one in (auto, other))
    for key, values in expected.items():
        lives = found[key] > 0  # on so few images some channels are zero everywhere
        assert lives.any() and np.array_equal(found[key][lives], values[lives])
    for unrepaired in ({"compensate": False}, {"compensate": "rescale"}, {"allocation": "additive"}):
        settings = PruneSection(budget=budget, **unrepaired)  # type: ignore[arg-type]
        assert set(methods(structure, settings).values()) == {"optin"}
    assert set(methods(find_structure(small_model("vit")[0]), auto).values()) == {"optin"}
    assert set(methods(find_structure(small_model("segformer")[0]), auto).values()) == {"optin"}


def test_auto_scores_each_kind_by_its_own_method() -> None:
    """A VGG has channels and, behind them, neurons."""
    model, _ = small_model("vgg")
    structure, batches = find_structure(model), batches_for(model, 2, size=2)
    settings = PruneSection(budget=Budget(macs=0.5), rows=128, probes=8)
    chosen = methods(structure, settings)
    assert {group.kind: chosen[group.key] for group in structure.groups} == {"channels": CHANNELS, "neurons": "optin"}
    values = score(model, structure, batches, settings, seed=0).values
    assert list(values) == [group.key for group in structure.groups]
    magnitude = magnitude_scores(model, structure)
    for group in structure.groups:
        assert np.array_equal(values[group.key], magnitude[group.key]) == (group.kind == "channels")
