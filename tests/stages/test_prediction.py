"""The predicted loss in words, when it is a warning, and what `prune.repair` makes of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from optin_export.recipe import FinetuneSection, Recipe
from optin_export.search import Cost, Plan, PlanTrial
from optin_export.stages.prediction import least_share, prediction, warning
from optin_export.stages.prune_and_repair import _tunes
from tests.conftest import Make


def plan_with(divergence: float, changed: float | None) -> Plan:
    trial = PlanTrial(fitted=64, judged=32, divergence=divergence, changed=changed)
    cost = Cost(macs=1, params=1)
    plan: dict[str, Any] = {"budget": {"macs": 0.5}, "base": cost, "predicted": cost, "score_kept": 1.0}
    return Plan(**plan, optimality_gap=0.0, groups={}, trial=trial)


def test_a_classifier_is_told_how_many_rows_change() -> None:
    plan = plan_with(0.97, 0.391)
    assert "of 32 calibration rows that a repair on 64 others has not seen, 39.1% get another class" in prediction(
        plan, "logits"
    )
    assert "0.97" in prediction(plan, "logits")
    told = warning(plan, "logits")
    assert told is not None and "predicts a large loss" in told and "39.1%" in told and "prune.repair: distill" in told
    assert warning(plan_with(0.02, 0.04), "logits") is None


def test_one_of_a_few_rows_is_no_warning() -> None:
    """The lower end of Wilson's interval, by a grid: the smallest share that reaches what was counted."""
    for share, rows in ((0.125, 8), (0.14, 128), (0.5, 32), (0.0, 8)):
        grid = np.linspace(0, 1, 200_001)
        reached = grid[np.abs(share - grid) <= 1.28 * np.sqrt(grid * (1 - grid) / rows) + 1e-12]
        assert least_share(share, rows) == pytest.approx(reached.min(), abs=1e-4)
    assert least_share(0.125, 8) < 0.1 < least_share(0.14, 128)


def test_an_embedding_is_told_its_cosine() -> None:
    plan = plan_with(0.5, None)  # |a - b|^2 = 2 - 2 cos for normalised a, b
    assert "cosine with the unpruned embedding is 0.750" in prediction(plan, "embedding")
    assert warning(plan, "embedding") is not None and warning(plan_with(0.1, None), "embedding") is None
    assert warning(plan_with(1e6, None), "regression") is None  # of no known scale


def test_without_a_trial_nothing_is_predicted() -> None:
    plan = plan_with(0.97, 0.391).model_copy(update={"trial": None})
    assert prediction(plan, "logits") == "" and warning(plan, "logits") is None


@pytest.mark.parametrize(
    ("how", "large", "small"), [("closed-form", False, False), ("distill", True, True), ("auto", True, False)]
)
def test_distillation_follows_the_recipe_or_the_prediction(
    vit_recipe: Make, how: str, large: bool, small: bool
) -> None:
    recipe = Recipe.model_validate(vit_recipe(prune={**vit_recipe()["prune"], "repair": how}))
    work: Any = SimpleNamespace(recipe=recipe, sources=SimpleNamespace(model=SimpleNamespace(output_kind="logits")))
    assert (_tunes(work, plan_with(0.97, 0.391)), _tunes(work, plan_with(0.02, 0.04))) == (large, small)
    own = recipe.model_copy(update={"finetune": FinetuneSection(steps=3)})
    work = SimpleNamespace(recipe=own, sources=work.sources)
    assert _tunes(work, plan_with(0.02, 0.04)) and own.tuning == FinetuneSection(steps=3)
