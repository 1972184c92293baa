"""Runs that merge tokens: the budget is spent to the MAC, what is saved is what was built, and every refusal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import optin_export
from optin_export.displays import Quiet
from optin_export.errors import InputError
from optin_export.pruning import load_model, narrow_attention, save_model
from optin_export.pruning.token_merging import insert_merging
from optin_export.recipe import validate
from optin_export.repair import RepairSettings, apply_plan
from optin_export.search import Plan, kept_share
from optin_export.stages import context, prediction
from optin_export.stages.context import RunContext
from optin_export.units import count_macs, find_structure, find_tokens
from tests.conftest import Make
from tests.repair.plans import halved
from tests.units.models import batches_for, inputs_for, small_model

pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.usefixtures("short_measurement")


def run(recipe: dict[str, Any], folder: Path, **options: Any) -> tuple[optin_export.Report | None, Plan]:
    report = optin_export.run(recipe, out=folder, **options)
    return report, Plan.model_validate_json((folder / "plan" / "plan.json").read_text())


def check_spent(folder: Path, plan: Plan, fraction: float, shape: tuple[int, ...] = (1, 1, 32, 32)) -> None:
    """Predicted MACs are those of the model that was built."""
    dense = load_model(folder / "model")
    counted = count_macs(dense, {"pixel_values": torch.zeros(shape)})
    assert counted == plan.predicted.macs <= fraction * plan.base.macs


def test_units_and_tokens_share_one_budget(tmp_path: Path, vit_recipe: Make) -> None:
    report, plan = run(vit_recipe(tokens={"keep": 0.8}), tmp_path)
    assert report is not None
    assert plan.merged == report.pruning.merged
    assert 0.7 < kept_share(plan.merged, 17, 3) <= 0.8
    check_spent(tmp_path, plan, 0.6)
    assert report.macs.pruned == plan.predicted.macs and report.macs.base == plan.base.macs
    assert report.parity.passed and report.pruning.masked_difference <= 1e-5
    # Tokens took their part: more units stay than without merging.
    _, without = run(vit_recipe(), tmp_path / "without", stop_after="search")
    kept = [sum(len(group.kept) for group in one.groups.values()) for one in (plan, without)]
    assert kept[0] > kept[1] and without.merged == ()


def test_dimensions_of_queries_and_keys_share_the_budget(tmp_path: Path, vit_recipe: Make) -> None:
    prune = {**vit_recipe()["prune"], "units": ["heads", "neurons", "dimensions"]}
    report, plan = run(vit_recipe(prune=prune), tmp_path)
    assert report is not None and report.parity.passed
    assert plan.dimensions and all(2 <= kept < 8 for kept in plan.dimensions.values())
    check_spent(tmp_path, plan, 0.6)
    assert report.macs.pruned == plan.predicted.macs and report.params.pruned == plan.predicted.params
    shown = {one.block: one.kept for one in report.pruning.groups if one.kind == "query/key dimensions"}
    assert shown == {block: plan.dimensions.get(f"block{block:02d}.dimensions", 8) for block in range(3)}
    # They took their part: more units stay than without them.
    recipe = vit_recipe(prune={**prune, "units": ["heads", "neurons"]})
    _, without = run(recipe, tmp_path / "without", stop_after="search")
    kept = [sum(len(group.kept) for group in one.groups.values()) for one in (plan, without)]
    assert kept[0] > kept[1] and not without.dimensions
    assert plan.predicted_loss is not None and without.predicted_loss is not None
    assert plan.predicted_loss < without.predicted_loss


def test_what_keeps_dimensions_that_the_recipe_lists_is_told(
    tmp_path: Path, vit_recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    prune = {**vit_recipe()["prune"], "units": ["heads", "neurons", "dimensions"]}
    recipe = validate(vit_recipe(prune=prune), tmp_path)

    def warned() -> str:
        work = RunContext(recipe, tmp_path, False)
        return f"{len(work.structure.attentions)} {' '.join(work.cache.warnings)}"

    assert warned() == "3 "
    with monkeypatch.context() as patch:
        patch.setattr(narrow_attention, "TOLERANCE", -1.0)
        assert "0 queries and keys of 3 of 3 attentions keep all dimensions" in warned()
    monkeypatch.setattr(context, "find_query_keys", lambda *given: ())
    assert "no attention of this model is known to work with fewer" in warned()


def test_a_schedule_is_carried_out_as_given(tmp_path: Path, vit_recipe: Make) -> None:
    prune = {**vit_recipe()["prune"], "budget": {"macs": 1.0}}
    _, plan = run(vit_recipe(tokens={"schedule": [5, 0, 2]}, prune=prune), tmp_path, stop_after="surgery")
    assert plan.merged == (5, 0, 2)
    assert all(len(group.kept) == group.count for group in plan.groups.values())
    check_spent(tmp_path, plan, 1.0)
    stored = json.loads((tmp_path / "model" / "architecture.json").read_text())
    assert stored["merged"] == [5, 0, 2]


@pytest.mark.parametrize(("schedule", "message"), [([1, 1, 1, 1], "4 entries"), ([8, 4, 3], "block 2")])
def test_impossible_schedules_end_the_run_before_anything_is_written(
    schedule: list[int], message: str, tmp_path: Path, vit_recipe: Make
) -> None:
    with pytest.raises(InputError, match=message):
        optin_export.run(vit_recipe(tokens={"schedule": schedule}), out=tmp_path / "run")
    assert not (tmp_path / "run" / "recipe.yaml").exists()


def test_auto_shares_the_budget_between_units_and_tokens(tmp_path: Path, vit_recipe: Make) -> None:
    prune = {**vit_recipe()["prune"], "budget": {"macs": 0.45}, "curve_samples": 32}
    recipe = vit_recipe(tokens={"keep": "auto"}, prune=prune)
    _, plan = run(recipe, tmp_path, stop_after="surgery")
    check_spent(tmp_path, plan, 0.45)
    record = json.loads((tmp_path / ".stages" / "search.accuracy.json").read_text())
    shares = record["result"]["shares"]
    assert len(shares) >= 3 and shares[0][0] == 1.0  # units alone, tokens alone, and both
    chosen = min(shares, key=lambda pair: pair[1])
    assert kept_share(plan.merged, 17, 3) == pytest.approx(chosen[0])
    _, repeated = run(recipe, tmp_path / "again", stop_after="search")
    assert repeated == plan


class Warnings(Quiet):
    """Collects the warnings of a run."""

    def __init__(self, warnings: list[str]) -> None:
        self.warnings = warnings

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def test_tokens_are_merged_if_units_alone_are_predicted_to_lose_too_much(
    tmp_path: Path, vit_recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    prune = {**vit_recipe()["prune"], "budget": {"macs": 0.5}, "curve_samples": 32}
    recipe = {name: section for name, section in vit_recipe(prune=prune).items() if name != "tokens"}
    warnings: list[str] = []
    monkeypatch.setattr(prediction, "MOST_CHANGED", 1.1)
    _, alone = run(recipe, tmp_path / "enough", stop_after="search")
    assert alone.merged == ()
    monkeypatch.setattr(prediction, "MOST_CHANGED", -1.0)
    _, plan = run(recipe, tmp_path / "run", stop_after="surgery", display=Warnings(warnings))
    check_spent(tmp_path / "run", plan, 0.5)
    assert any(plan.merged)
    log = json.loads((tmp_path / "run" / ".stages" / "search.json").read_text())["result"]
    shares = dict(log["shares"])
    assert alone.trial is not None and plan.trial is not None
    # Judged on the same rows as the plan without merging, which is among those that were tried.
    assert shares[1.0] == pytest.approx(alone.trial.divergence, rel=1e-3)
    assert plan.trial.divergence == pytest.approx(min(shares.values()), rel=1e-3)
    assert plan.trial.divergence < alone.trial.divergence
    merged = "+".join(map(str, plan.merged))
    assert any(
        f"tokens are merged as well ({merged} per block)" in text and "tokens.keep: 1.0" in text for text in warnings
    )
    _, kept = run({**recipe, "tokens": {"keep": 1.0}}, tmp_path / "kept", stop_after="search")
    assert kept.merged == ()


def test_auto_needs_a_budget_of_macs(tmp_path: Path, vit_recipe: Make) -> None:
    prune = {**vit_recipe()["prune"], "budget": {"params": 0.5}}
    with pytest.raises(InputError, match=r"prune\.budget\.macs"):
        optin_export.run(vit_recipe(tokens={"keep": "auto"}, prune=prune), out=tmp_path / "run")


def test_text_is_padded_to_the_shipped_length_and_loses_padding_first(tmp_path: Path, bert_recipe: Make) -> None:
    report, plan = run(bert_recipe(tokens={"keep": 0.75}), tmp_path)
    assert report is not None and report.parity.passed
    assert any(plan.merged) and kept_share(plan.merged, 16, 3) <= 0.75
    assert report.macs.pruned == plan.predicted.macs


@pytest.mark.parametrize("name", ["vit", "deit-distilled", "vit-transformers", "bert-embedding"])
def test_what_is_saved_is_what_was_built(name: str, tmp_path: Path) -> None:
    model, architecture = small_model(name)
    structure = find_structure(model)
    plan = halved(structure).model_copy(update={"merged": (2, 2, 1)})
    inputs = inputs_for(model, 3, 5)
    operation = apply_plan(model, structure, plan, batches_for(model, 3), inputs, RepairSettings())
    assert operation.masked_difference <= 1e-5
    save_model(tmp_path, operation.dense, architecture, structure, plan, inputs)
    data = inputs_for(model, 4, 8)
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path)(**data), operation.dense(**data))


@pytest.mark.parametrize("name", ["vit", "deit3-layer-scale", "vit-transformers"])
def test_the_repair_lowers_the_error_on_the_merged_stream(name: str) -> None:
    model, _ = small_model(name)
    structure = find_structure(model)
    plan = halved(structure).model_copy(update={"merged": (3, 2, 2)})
    inputs, batches = inputs_for(model, 6, 1), batches_for(model, 5)
    plain = apply_plan(model, structure, plan, (), inputs, RepairSettings(repair=False)).dense
    repaired = apply_plan(model, structure, plan, batches, inputs, RepairSettings())
    assert all(one.after <= one.before * 1.001 + 1e-12 for one in repaired.repairs.values())
    with torch.no_grad():
        errors = [float((one(**inputs) - model(**inputs)).square().sum()) for one in (plain, repaired.dense)]
    assert errors[1] < errors[0]


def test_without_any_merging_nothing_is_inserted() -> None:
    model, _ = small_model("vit")
    unchanged = insert_merging(model, find_structure(model), find_tokens(model), (0, 0, 0))
    assert not any(hasattr(module, "merging") for module in unchanged.modules())


def test_an_altered_schedule_in_a_saved_model_is_refused(tmp_path: Path) -> None:
    model, architecture = small_model("vit")
    structure = find_structure(model)
    plan = halved(structure).model_copy(update={"merged": (2,)})
    operation = apply_plan(model, structure, plan, (), inputs_for(model, 2, 0), RepairSettings(repair=False))
    save_model(tmp_path, operation.dense, architecture, structure, plan, inputs_for(model, 2, 0))
    path = tmp_path / "architecture.json"
    stored = json.loads(path.read_text())
    path.write_text(json.dumps({**stored, "merged": [9]}))
    with pytest.raises(InputError, match="9 tokens in block 0"):
        load_model(tmp_path)
