"""The other scores: one interface, what they measure, and the faults the reference keeps on purpose."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch

from optin_export.data import Batch
from optin_export.models import TaskModel
from optin_export.recipe import Budget, PruneSection
from optin_export.scoring import CHANNELS, methods, score
from optin_export.scoring.activation import activation_scores, contributions
from optin_export.scoring.baselines import magnitude_scores
from optin_export.scoring.reference import reference_scores
from optin_export.units import Structure, block_outputs, find_structure, get_layer, masked, tensor_of
from tests.units.models import batches_for, inputs_for, small_model

METHODS = get_args(PruneSection.model_fields["score"].annotation)


@pytest.mark.parametrize("name", ["bert", "bert-spans", "gpt2", "llama", "vit", "resnet-timm-bottleneck", "vgg"])
@pytest.mark.parametrize("method", METHODS)
def test_methods_share_one_interface(name: str, method: str) -> None:
    """A finite number for every unit, the same for the same seed, and units that differ."""
    model, _ = small_model(name)
    structure, batches = find_structure(model), batches_for(model, 2, size=2)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    settings = PruneSection(budget=Budget(macs=0.5), score=method, probes=8, rows=128)  # type: ignore[arg-type]
    first, second = (score(model, structure, batches, settings, seed=3) for _ in range(2))
    for group in structure.groups:
        values = first.values[group.key]
        assert values.shape == (group.count,) and values.dtype == np.float64
        assert np.isfinite(values).all() and values.min() >= 0
        assert len(np.unique(values)) > 1
        assert np.array_equal(values, second.values[group.key])
    assert list(first.values) == [group.key for group in structure.groups]
    assert first.info == second.info and first.info["without_effect"] >= 0
    # The model is as it was: no hook, no shadowed forward, no gradient, the same weights.
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not any("forward" in vars(module) for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


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


def all_rows(model: TaskModel, batch: Batch, structure: Structure, seed: int = 0) -> dict[str, np.ndarray]:
    """The reference with every token row compared, so that the rows it draws again each time are the same ones."""
    return reference_scores(model, structure, batch, 10**6, seed)


def test_the_reference_favours_units_by_their_index() -> None:
    """Neurons in another order get other scores: each is multiplied by a prior on its place, 100 down to 1."""
    model, _ = small_model("bert")
    structure, batch = find_structure(model), batches_for(model, 1, size=3)[0]
    group = structure.groups[1]
    first = all_rows(model, batch, structure.only(["neurons"]))[group.key]
    order = torch.randperm(group.count, generator=torch.Generator().manual_seed(1))
    up, down = get_layer(model, group.producers[0].path), get_layer(model, group.consumer)
    assert up.bias is not None
    up.weight.data, up.bias.data = up.weight.data[order], up.bias.data[order]
    down.weight.data = down.weight.data[:, order]
    second = all_rows(model, batch, structure.only(["neurons"]))[group.key]
    prior = np.geomspace(100, 1, group.count)
    same_neuron = first[order.numpy()]
    assert np.abs(second / same_neuron - 1).max() > 5
    kept = (second / prior) / (same_neuron / prior[order.numpy()])
    assert np.median(np.abs(kept - 1)) < 0.05  # without the prior they are the same, but for rounding of tiny losses


def test_the_reference_leaves_heads_of_earlier_blocks_masked() -> None:
    """A later unit is scored with the last head of every block up to its own missing as well."""
    model, _ = small_model("bert")
    structure, batch = find_structure(model), batches_for(model, 1, size=3)[0]
    scores = all_rows(model, batch, structure)
    heads, group = structure.groups[0], structure.groups[2]  # heads of the first and of the second block

    def loss(masks: dict[str, torch.Tensor], blocks: tuple[str, ...]) -> float:
        results = []
        for applied in ({}, masks):
            with torch.no_grad(), block_outputs(model, blocks) as found, masked(model, structure.groups, applied):
                logits = model(**batch.inputs)
            rows = [torch.nn.functional.normalize(tensor_of(found[path]).flatten(0, 1), dim=-1) for path in blocks]
            results.append(([one @ one.T for one in rows], torch.log_softmax(logits, -1)))
        (before, p), (after, q) = results
        distance = sum(float((a - b).square().sum()) for a, b in zip(before, after, strict=True))
        divergence = 16 * float((p.exp() * (p - q)).sum(-1).mean())
        return distance + 10.0 ** (np.floor(np.log10(distance)) - np.floor(np.log10(divergence))) * divergence

    without = torch.ones(4)
    without[-1] = 0
    unit = torch.ones(4)
    unit[1] = 0
    prior = np.geomspace(10, 1, 4)[1] * 0.5  # heads count half
    later = structure.blocks[2:]
    assert scores[group.key][1] == pytest.approx(prior * loss({heads.key: without, group.key: unit}, later), rel=1e-3)
    assert scores[group.key][1] != pytest.approx(prior * loss({group.key: unit}, later), rel=0.05)


def test_the_reference_draws_rows_anew_and_takes_padding_for_text() -> None:
    model, _ = small_model("bert")
    structure, batch = find_structure(model).only(["heads"]), batches_for(model, 1, size=3)[0]
    first, second = (reference_scores(model, structure, batch, 8, seed)["block00.heads"] for seed in (0, 1))
    assert not np.allclose(first, second, rtol=0.05)
    longer = Batch({key: torch.nn.functional.pad(value, (0, 6)) for key, value in batch.inputs.items()}, batch.rows)
    assert not np.allclose(
        all_rows(model, batch, structure)["block00.heads"],
        all_rows(model, longer, structure)["block00.heads"],
        rtol=0.05,
    )


def test_only_the_first_batch_is_the_references() -> None:
    model, _ = small_model("vgg")
    structure, batches = find_structure(model), batches_for(model, 1, size=3)
    settings = PruneSection(budget=Budget(macs=0.5), score="optin-reference", rows=128)
    one = score(model, structure, batches, settings, seed=0).values
    two = score(model, structure, [*batches, Batch(inputs_for(model, 2, 9), np.arange(2))], settings, seed=0).values
    assert all(np.array_equal(one[key], two[key]) for key in one)


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
