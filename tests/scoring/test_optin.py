"""OPTIN's score: the sketch estimates what exact masking measures; padding and order do not matter."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from optin_export.families import find_structure
from optin_export.recipe import Budget, PruneSection, validate
from optin_export.scoring import score
from optin_export.scoring.losses import observe, output_loss, output_probe, relation
from optin_export.scoring.optin import exact_losses, optin_scores
from optin_export.sources import Batch, Sources, load_sources
from tests.conftest import Make


@pytest.fixture
def sources(bert_recipe: Make, tmp_path) -> Sources:  # type: ignore[no-untyped-def]
    return load_sources(validate(bert_recipe(), tmp_path))


@pytest.fixture
def classifier(classifier_recipe: Make, tmp_path) -> Sources:  # type: ignore[no-untyped-def]
    return load_sources(validate(classifier_recipe(), tmp_path))


def run(sources: Sources, probes: int, seed: int = 0, batches: tuple[Batch, ...] | None = None):  # type: ignore[no-untyped-def]
    structure = find_structure(sources.model)
    return optin_scores(
        sources.model,
        structure,
        batches or sources.scoring,
        probes=probes,
        rows=64,
        temperature=1.0,
        seed=seed,
        tick=lambda done, total: None,
    )


@pytest.mark.parametrize("kind", ["sources", "classifier"])
def test_the_sketch_ranks_neurons_as_exact_masking_does(kind: str, request: pytest.FixtureRequest) -> None:
    """In float64, where the exact loss of one neuron is not lost in rounding."""
    loaded: Sources = request.getfixturevalue(kind)
    model, structure = loaded.model.double(), find_structure(loaded.model)
    scores, info = run(loaded, probes=256)
    generator = torch.Generator().manual_seed(0)
    references = [observe(model, structure.blocks, batch.inputs, 64, generator) for batch in loaded.scoring]
    for group in structure.groups:
        if group.kind == "neurons":
            trajectory, output = exact_losses(model, structure, group, references, 1.0)
            exact = trajectory + info["lambda"] * output
            assert spearmanr(exact, scores[group.key]).statistic > 0.9
            # Not only the order: both are the same quantity.
            assert 0.6 < scores[group.key].sum() / exact.sum() < 1.7


def test_heads_are_masked_exactly(sources: Sources) -> None:
    """A head's score is the loss of a plain forward pass with the head's columns of the projection zeroed."""
    structure = find_structure(sources.model)
    group = structure.groups[2]  # heads of the second block: there is a prefix to replay
    batch = sources.scoring[0]
    reference = observe(sources.model, structure.blocks, batch.inputs, 64, torch.Generator().manual_seed(0))
    trajectory, output = exact_losses(sources.model, structure, group, [reference], 1.0)
    weight = sources.model.get_submodule(group.consumer).weight
    kept = weight.detach().clone()
    weight.data[:, 0 : group.width] = 0.0
    changed = observe(sources.model, structure.blocks, batch.inputs, 64, torch.Generator().manual_seed(0))
    weight.data.copy_(kept)
    expected = sum(
        float((changed.relations[path] - reference.relations[path]).square().sum()) for path in structure.blocks[1:]
    )
    assert trajectory[0] == pytest.approx(expected, rel=1e-3)
    assert output[0] == pytest.approx(output_loss(sources.model, reference.output, changed.output, 1.0), rel=1e-3)


def test_same_seed_same_scores(sources: Sources) -> None:
    first, second, other = run(sources, 12, 3)[0], run(sources, 12, 3)[0], run(sources, 12, 4)[0]
    assert all(np.array_equal(first[key], second[key]) for key in first)
    assert any(not np.array_equal(first[key], other[key]) for key in first)


def test_more_padding_changes_nothing(sources: Sources) -> None:
    def padded(batch: Batch) -> Batch:
        extra = {name: torch.nn.functional.pad(tensor, (0, 5)) for name, tensor in batch.inputs.items()}
        return Batch(extra, batch.rows)

    first, _ = run(sources, 12)
    second, _ = run(sources, 12, batches=tuple(padded(batch) for batch in sources.scoring))
    for key in first:
        np.testing.assert_allclose(first[key], second[key], rtol=2e-3)


def test_scores_follow_their_units_through_a_permutation(sources: Sources) -> None:
    """No prior on the index of a unit: neurons in another order get the same scores in that order."""
    first, _ = run(sources, 64)
    structure = find_structure(sources.model)
    group = next(group for group in structure.groups if group.kind == "neurons")
    order = torch.randperm(group.count, generator=torch.Generator().manual_seed(1))
    up = sources.model.get_submodule(group.producers[0].path)
    down = sources.model.get_submodule(group.consumer)
    up.weight.data, up.bias.data = up.weight.data[order], up.bias.data[order]
    down.weight.data = down.weight.data[:, order]
    second, _ = run(sources, 64)
    np.testing.assert_allclose(second[group.key], first[group.key][order.numpy()], rtol=1e-2)


def test_a_unit_without_effect_scores_nothing(sources: Sources) -> None:
    structure = find_structure(sources.model)
    for group in structure.groups[:2]:
        sources.model.get_submodule(group.consumer).weight.data[:, : group.width] = 0.0
    scores, _ = run(sources, 12)
    for group in structure.groups[:2]:
        assert scores[group.key][0] < 1e-8 < scores[group.key][1:].min()


def test_lambda_gives_both_terms_the_same_weight(classifier: Sources) -> None:
    structure = find_structure(classifier.model)
    heads_only = structure.only(["heads"])
    scores, info = optin_scores(
        classifier.model,
        heads_only,
        classifier.scoring,
        probes=4,
        rows=64,
        temperature=1.0,
        seed=0,
        tick=lambda done, total: None,
    )
    generator = torch.Generator().manual_seed(0)
    references = [observe(classifier.model, structure.blocks, b.inputs, 64, generator) for b in classifier.scoring]
    parts = [exact_losses(classifier.model, structure, group, references, 1.0) for group in heads_only.groups]
    trajectory, output = (sum(part[i].sum() for part in parts) for i in (0, 1))
    assert info["lambda"] == pytest.approx(trajectory / output, rel=1e-3)
    assert sum(values.sum() for values in scores.values()) == pytest.approx(2 * trajectory, rel=1e-3)


def test_relation_is_cosine_similarity() -> None:
    rows = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]])
    half = 0.5**0.5
    torch.testing.assert_close(relation(rows), torch.tensor([[1.0, 0.0, half], [0.0, 1.0, half], [half, half, 1.0]]))


def test_output_probe_squares_to_the_divergence(classifier: Sources) -> None:
    """E[(gradient of the probe . step)^2] is KL(p || p') to second order."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.tensor([[1.0, -0.5, 0.3]], dtype=torch.float64)
    step = torch.tensor([[1e-2, -2e-2, 5e-3]], dtype=torch.float64)
    squares = []
    for _ in range(4000):
        at = logits.clone().requires_grad_(True)
        probe = output_probe(classifier.model, at, 1.0, generator)
        (gradient,) = torch.autograd.grad(probe, at)
        squares.append(float((gradient * step).sum() ** 2))
    assert np.mean(squares) == pytest.approx(output_loss(classifier.model, logits, logits + step, 1.0), rel=0.1)


@pytest.mark.parametrize("method", ["optin", "magnitude", "random"])
def test_methods_share_one_interface(sources: Sources, method: str) -> None:
    structure = find_structure(sources.model)
    config = PruneSection(budget=Budget(macs=0.5), score=method, probes=8, rows=32)  # type: ignore[arg-type]
    scores = score(sources.model, structure, sources.scoring, config, seed=0)
    assert {key: values.shape for key, values in scores.values.items()} == {
        group.key: (group.count,) for group in structure.groups
    }
