"""Scorers of the studies: what every scorer has to do, and what they are compared with here."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from optin_export.data import Batch
from optin_export.errors import InputError
from optin_export.progress import reporting
from optin_export.recipe import Budget, PruneSection
from optin_export.scoring import SCORERS, score
from optin_export.units import find_structure
from tests.scoring.interface import check_scorer
from tests.scoring.test_shards import scores_of, workers
from tests.scoring.test_sketch import fisher_of, reference_of
from tests.test_docs import load_tool
from tests.units.models import batches_for, inputs_for, small_model

load_tool("comparison_scorers")
joint = load_tool("study_joint")
METHODS = ("fisher", "random", "obs", "optin-reference")


@pytest.mark.parametrize("name", ["bert", "vit", "resnet-timm-bottleneck", "vgg"])
@pytest.mark.parametrize("method", METHODS)
def test_scorers_of_the_studies_share_the_interface(name: str, method: str) -> None:
    check_scorer(name, method)


def test_they_are_registered_beside_those_of_recipes() -> None:
    assert {*METHODS, "optin", "optin-exact", "magnitude", "activation"} <= set(SCORERS)


@pytest.mark.parametrize("method", METHODS)
def test_progress_reaches_its_end(method: str) -> None:
    model, _ = small_model("bert")
    structure, batches = find_structure(model), batches_for(model, 1, size=2)
    settings = PruneSection(budget=Budget(macs=0.5), probes=8, rows=256).model_copy(update={"score": method})
    seen: list[tuple[int, int]] = []
    with reporting(lambda *step: seen.append(step)):
        score(model, structure, batches, settings, 0)
    assert all(done <= total for done, total in seen) and [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert method in ("fisher", "random") or seen[-1][0] == seen[-1][1] == sum(one.count for one in structure.groups)


def test_fisher_does_not_depend_on_the_number_of_workers() -> None:
    alone = scores_of("bert", "fisher")
    for count in (1, 2):
        spread = scores_of("bert", "fisher", workers(count, [], backwards=count > 1))
        assert spread.info == alone.info
        assert all(np.array_equal(values, spread.values[key]) for key, values in alone.values.items())


@pytest.mark.parametrize("value", [float("nan"), 3e38])
def test_fisher_scores_that_are_not_finite_are_refused(value: float) -> None:
    model, _ = small_model("vit")
    batches = [Batch({"pixel_values": torch.full_like(inputs_for(model, 4, 0)["pixel_values"], value)}, np.arange(4))]
    settings = PruneSection(budget=Budget(macs=0.5), probes=4).model_copy(update={"score": "fisher"})
    with pytest.raises(InputError, match="not finite"):
        score(model, find_structure(model), batches, settings, seed=0)


def test_fisher_scores_of_two_classes_have_no_noise() -> None:
    """The scorer `fisher` draws its probes in chunks of four: exact for two classes, whatever the seed."""
    model, _ = small_model("bert")
    structure, batches = find_structure(model), batches_for(model, 1, size=4)
    settings = PruneSection(budget=Budget(macs=0.5), probes=4).model_copy(update={"score": "fisher"})
    scores = [score(model, structure, batches, settings, seed=seed) for seed in (0, 1)]
    assert scores[0].info["probes"] == 4
    expected = fisher_of(model, reference_of(model), 1.0)
    for key, values in expected.items():
        for one in scores:
            np.testing.assert_allclose(one.values[key], values, rtol=1e-3, atol=1e-5 * values.max())


def test_halves_sum_to_the_whole_of_the_gradients() -> None:
    model, _ = small_model("vit")
    references = [reference_of(model), reference_of(model)]
    structure, generator = find_structure(model), torch.Generator().manual_seed(0)
    kept = joint.Gradients(model, structure, structure.groups, references, 1.0, generator)
    kept.add_probes(2.0, 3)
    kept.add_probes(2.0, 6)
    assert kept.probes == 9 and kept.counts == [5, 4]
    for key, values in kept.values().items():
        assert len(kept.kept[key]) == 9 * 2  # per probe and batch, [samples, units]
        squares = sum(np.square(one).sum(0) for one in kept.kept[key]) / (9 * 8)
        np.testing.assert_allclose(values, squares)
