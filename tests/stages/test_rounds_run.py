"""Plans chosen in rounds: what every round sees, and what a run makes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import optin_export
from optin_export import scoring, search
from optin_export.errors import InputError
from optin_export.recipe import validate
from tests.conftest import Make

SMALL = {"probes": 12, "rows": 64, "score_samples": 16, "curve_samples": 32}


def plan_of(recipe: dict[str, Any], folder: Path) -> search.Plan:
    optin_export.run(recipe, out=folder, stop_after="search")
    return search.Plan.model_validate_json((folder / "plan" / "plan.json").read_text())


@pytest.mark.parametrize("kind", ["macs", "params"])
@pytest.mark.parametrize("allocation", ["joint", "additive"])
def test_every_round_scores_what_the_last_one_left(
    kind: str, allocation: str, vit_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    real = scoring.score

    def spy(model: Any, structure: Any, *args: Any, **kwargs: Any) -> scoring.Scores:
        seen.append(sum(group.count for group in structure.groups))
        return real(model, structure, *args, **kwargs)

    monkeypatch.setattr(scoring, "score", spy)
    prune = {**SMALL, "budget": {kind: 0.5}, "align": 4, "allocation": allocation, "rounds": 3}
    plan = plan_of(vit_recipe(prune=prune), tmp_path / "run")
    assert len(seen) == 3 and seen[0] > seen[1] > seen[2] > sum(len(group.kept) for group in plan.groups.values())
    assert plan.rounds == 3 and plan.budget == {kind: 0.5}
    assert 0.4 < getattr(plan.predicted, kind) / getattr(plan.base, kind) <= 0.5


def test_one_round_is_the_plan_without_rounds(vit_recipe: Make, tmp_path: Path) -> None:
    """The same budget by way of the rounds' own code."""
    from optin_export.stages import search

    prune = {**SMALL, "budget": {"macs": 0.5}, "rounds": 1}
    recipe = vit_recipe(prune=prune)
    expected = plan_of(recipe, tmp_path / "plain")
    work = optin_export.stages.context.RunContext(  # type: ignore[attr-defined]
        validate(recipe, tmp_path), tmp_path / "plain", False
    )
    from safetensors.numpy import load_file

    scores, curves = (load_file(tmp_path / "plain" / "scores" / f"{name}.safetensors") for name in ("scores", "curves"))
    found = search.choose_in_rounds(
        work.sources, work.structure, work.costs, work.least, scores, curves, work.sensitivities
    )
    assert found.groups == expected.groups and found.predicted == expected.predicted


@pytest.mark.usefixtures("short_measurement")
def test_a_run_in_rounds_ends_with_a_verdict_and_is_reused(vit_recipe: Make, tmp_path: Path) -> None:
    recipe = vit_recipe(prune={**SMALL, "budget": {"macs": 0.6}, "rounds": 2})
    report = optin_export.run(recipe, out=tmp_path / "run")
    assert report is not None and report.verdict.passed and report.macs.ratio <= 0.6
    again = optin_export.run(recipe, out=tmp_path / "run")
    assert again is not None and all(stage.reused for stage in again.stages if stage.name in ("scoring", "search"))


@pytest.mark.parametrize(
    "change",
    [{"prune": {"budget": {"speedup": 1.5}}}, {"prune": {"budget": {"accuracy_drop": 1.0}}}, {"tokens": {"keep": 0.7}}],
    ids=str,
)
def test_rounds_need_a_budget_that_can_be_shared_out(change: dict[str, Any], vit_recipe: Make) -> None:
    prune = {"budget": {"macs": 0.5}, **change.pop("prune", {}), "rounds": 2}
    with pytest.raises(InputError, match="rounds"):
        validate(vit_recipe(prune=prune, **change), Path.cwd())
