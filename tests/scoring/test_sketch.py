"""The sketch: one backward pass gives every sample's own gradient of every unit."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from optin_export.data import Batch
from optin_export.models import TaskModel
from optin_export.recipe import Budget, PruneSection
from optin_export.scoring import score, sketch
from optin_export.scoring.losses import Reference, observe, output_probe, relation
from optin_export.scoring.sketch import Sketch
from optin_export.units import find_structure
from tests.units.models import batches_for, small_model


def sketch_of(model: TaskModel, references: list[Reference], temperature: float = 1.0) -> Sketch:
    structure = find_structure(model)
    return Sketch(model, structure, structure.groups, references, temperature, torch.Generator().manual_seed(0))


def reference_of(model: TaskModel, rows: int = 4) -> Reference:
    batch = batches_for(model, 1, size=4)[0]
    kind = next(model.parameters()).dtype
    inputs = {key: value.to(kind) if value.is_floating_point() else value for key, value in batch.inputs.items()}
    batch = Batch(inputs, batch.rows)
    return observe(model, find_structure(model), batch, rows, torch.Generator().manual_seed(0))


def only(reference: Reference, sample: int, model: TaskModel) -> Reference:
    """One sample of a reference by itself, without padding, compared at the same token rows."""
    mask = reference.inputs.get("attention_mask")
    length = None if mask is None else int(mask[sample].sum())
    inputs = {key: value[sample : sample + 1, :length] for key, value in reference.inputs.items()}
    with torch.no_grad():
        result = model(**inputs)
    chosen = {(1, length or tokens): rows[sample : sample + 1] for (_, tokens), rows in reference.chosen.items()}
    rows = {path: value[sample : sample + 1] for path, value in reference.rows.items()}
    return dataclasses.replace(
        reference, inputs=inputs, chosen=chosen, rows=rows, output=result[:, None], weights=torch.ones(1, 1), hidden={}
    )


def gradients(model: TaskModel, reference: Reference, noises: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """v . dr/dm of a residual made of relations and output, with given directions v for every sample."""
    sketch_ = sketch_of(model, [reference])
    with sketch_._pass(reference) as (masks, rows, result):
        probe = output_probe(model.output_kind, result, 1.0, noises[0][:, None, : result.shape[2]], reference.weights)
        for block in rows:
            found = relation(block).flatten(1)
            probe = probe + (noises[1][:, : found.shape[1]] * found).sum()
        return sketch_._gradients(probe, masks)


@pytest.mark.parametrize("name", ["bert", "bert-embedding", "vit", "resnet-timm", "vgg-bn"])
def test_a_samples_gradient_is_that_of_the_sample_alone(name: str) -> None:
    """Whatever else lies in the batch, and however much padding it needs beside longer ones."""
    model, _ = small_model(name)
    reference = reference_of(model.double())
    generator = torch.Generator().manual_seed(1)
    noises = [torch.randn(4, 64, generator=generator, dtype=torch.float64) for _ in range(2)]
    together = gradients(model, reference, noises)
    for sample in range(4):
        alone = gradients(model, only(reference, sample, model), [noise[sample : sample + 1] for noise in noises])
        for group in find_structure(model).groups:
            assert together[group.key].shape == (4, group.count)
            torch.testing.assert_close(together[group.key][sample], alone[group.key][0], rtol=1e-6, atol=1e-12)


def fisher_of(model: TaskModel, reference: Reference, temperature: float) -> dict[str, np.ndarray]:
    """Half the quadratic form of the softmax' Fisher matrix per unit, from one backward pass per class and sample."""
    total: dict[str, np.ndarray] = {}
    sketch_ = sketch_of(model, [reference])
    with sketch_._pass(reference) as (masks, _, result):
        result = result[:, 0]
        per_class = [sketch_._gradients(result[:, label].sum(), masks) for label in range(result.shape[1])]
        p = torch.softmax(result.detach() / temperature, -1).double()[..., None]
    for key in masks:
        slopes = torch.stack([found[key] for found in per_class], 1)  # [samples, classes, units]
        form = (p * slopes.square()).sum(1) - (p * slopes).sum(1).square()
        total[key] = (form.mean(0) / (2 * temperature**2)).numpy()
    return total


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("name", ["vit", "resnet-timm"])
def test_as_many_probes_as_classes_are_the_exact_fisher_matrix(
    name: str, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = small_model(name)
    monkeypatch.setattr(sketch, "CHUNK", 5)
    references = [reference_of(model)]
    found = sketch_of(model, references, temperature)
    _, output = found.pilot_losses([found.work(shard) for shard in found.pilot_shards()])
    for key, expected in fisher_of(model, references[0], temperature).items():
        np.testing.assert_allclose(output[key], expected, rtol=1e-3, atol=1e-5 * expected.max())


def autocast_scores(name: str, autocast: str | None) -> dict[str, np.ndarray]:
    model, _ = small_model(name)
    structure, batches = find_structure(model), batches_for(model, 1, size=8)
    settings = PruneSection(budget=Budget(macs=0.5), probes=16, autocast=autocast)  # type: ignore[arg-type]
    return score(model, structure, batches, settings, seed=0).values


def ranks_alike(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> float:
    return float(spearmanr(*(np.concatenate(list(values.values())) for values in (first, second))).statistic)


@pytest.mark.parametrize("name", ["bert", "vit", "resnet-timm"])
def test_bfloat16_ranks_as_float32_does(name: str) -> None:
    assert ranks_alike(autocast_scores(name, None), autocast_scores(name, "bfloat16")) >= 0.9


@pytest.mark.parametrize("name", ["bert", "resnet-timm", "vgg-bn"])
def test_float16_neither_underflows_nor_overflows(name: str) -> None:
    try:
        with torch.autocast("cpu", torch.float16):
            torch.nn.functional.conv2d(torch.ones(1, 1, 3, 3), torch.ones(1, 1, 3, 3))
            torch.ones(2, 2) @ torch.ones(2, 2)
    except RuntimeError as error:
        pytest.skip(f"no float16 on this CPU: {error}")
    single, half = autocast_scores(name, None), autocast_scores(name, "float16")
    assert all((half[key][single[key] > 0] > 0).all() for key in half)
    assert ranks_alike(single, half) >= 0.9


def test_gradients_below_half_precision_survive() -> None:
    """A residual so small that its gradient has no place in float16 is scaled up on the way back."""
    model, _ = small_model("vit")
    reference = reference_of(model)
    half = dataclasses.replace(sketch_of(model, [reference]), autocast="float16")
    with half._pass(reference) as (masks, _, result):
        found = half._gradients(3e-7 * result.sum(), masks)
    last = find_structure(model).groups[-1].key
    assert (found[last] != 0).float().mean() > 0.9
