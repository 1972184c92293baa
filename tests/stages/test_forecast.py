"""Forecasts count what the stages do: passes are counted while they run, and compared."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from optin_export import cli, repair, scoring
from optin_export.pruning import insert_merging
from optin_export.recipe import validate
from optin_export.report.schema import Report
from optin_export.stages.context import RunContext
from optin_export.stages.forecast import NAME, Forecast, forecast, forecast_of, recall_forecast, remember_forecast
from optin_export.stages.pipeline import run
from optin_export.units import Effort, find_tokens, get_module, measured
from tests.conftest import Make
from tests.repair.plans import halved


def context(make: Make, folder: Path, **sections: Any) -> RunContext:
    return RunContext(validate(make(**sections), folder), folder, False)


@contextmanager
def counted(work: RunContext, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, float]]:
    """Passes of rows through all blocks (with a graph, or without) and backward passes of rows, while this is open."""
    model, rows, found = work.sources.model, [0], {"forward": 0.0, "graph": 0.0, "backward": 0.0}
    blocks, gradients = work.structure.blocks, torch.autograd.grad

    def block(module: Any, args: Any, output: Any) -> None:
        rows[0] = len(output)
        found["graph" if torch.is_grad_enabled() else "forward"] += len(output) / len(blocks)

    def grad(*args: Any, **options: Any) -> Any:
        found["backward"] += rows[0]
        return gradients(*args, **options)

    monkeypatch.setattr(torch.autograd, "grad", grad)
    # Hooks of a block also see its replayed outputs, those of its first layer only passes.
    handles = [get_module(model, f"{path}.norm1").register_forward_hook(block) for path in blocks]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
        monkeypatch.undo()


def near(found: dict[str, float], expected: Effort) -> None:
    assert found["forward"] == pytest.approx(expected.forward, rel=0.3)
    assert found["graph"] == pytest.approx(expected.graph, rel=0.3)
    assert found["backward"] == pytest.approx(expected.backward, rel=0.05)


def test_scoring_is_counted(vit_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = context(vit_recipe, tmp_path)
    structure, prune = work.structure, work.recipe.prune
    with counted(work, monkeypatch) as found:
        scoring.score(work.sources.model, structure, work.sources.scoring, prune, 0)
    near(found, scoring.effort(structure, prune, scoring.methods(structure, prune), 16))


def test_loss_curves_are_counted(vit_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = context(vit_recipe, tmp_path)
    sources, sizes = work.sources, _sizes(work)
    structure = measured(sources.model, work.structure, sources.calibration[0].inputs)
    scores = scoring.score(sources.model, structure, sources.scoring, work.recipe.prune, 0).values
    with counted(work, monkeypatch) as found:
        weights = repair.sensitivities(sources.model, structure, sources.calibration, 0)
    near(found, repair.sensitivity_effort(48))
    with counted(work, monkeypatch) as found:
        repair.loss_curves(
            sources.model,
            structure,
            scores,
            sources.calibration,
            sources.curves,
            work.repair_settings,
            least=work.least,
            weights=weights,
        )
    judged = sum(len(batch.rows) for batch in sources.curves)
    few = sum(len(batch.rows) for batch in sources.curves[::4]) / judged * 4  # batches are thinned, not rows
    effort = repair.curves_effort(structure, sizes, work.repair_settings, 48, judged)
    fitted = 48 - judged
    expected = Effort(fitted + few * (effort.forward - fitted), effort.graph, effort.backward)
    assert found["forward"] == pytest.approx(expected.forward, rel=0.4)
    assert found["graph"] == pytest.approx(expected.graph, rel=0.3)
    assert found["backward"] == expected.backward


def _sizes(work: RunContext) -> dict[str, Any]:
    from optin_export.units import layer_sizes

    groups = work.structure.groups
    paths = {path for one in groups for path in one.reads} | {each.path for one in groups for each in one.producers}
    return layer_sizes(work.sources.model, dict.fromkeys(paths, 17.0), sorted(paths))


def test_efforts_add_up() -> None:
    one = Effort(1, 2, 3, 4, 5)
    assert one + 2 * one == one * 3 == Effort(3, 6, 9, 12, 15)


@pytest.mark.parametrize(
    ("sections", "larger"),
    [
        ({"prune": {"budget": {"macs": 0.6}, "probes": 48, "score_samples": 16}}, "scoring"),
        ({"prune": {"budget": {"macs": 0.6}, "score_samples": 48}}, "scoring"),
        ({"prune": {"budget": {"macs": 0.6}, "gauss_newton": True, "score_samples": 16}}, "surgery"),
        ({"finetune": {"steps": 4000}}, "surgery"),
        ({"export": {"batch": [1, 2, 3, 4]}}, "measure"),
        ({"tokens": {"keep": "auto"}}, "search"),
    ],
)
def test_what_asks_for_more_takes_longer(
    sections: dict[str, Any], larger: str, vit_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _fixed_speed(monkeypatch)
    before, after = forecast(context(vit_recipe, tmp_path)), forecast(context(vit_recipe, tmp_path, **sections))
    assert after.seconds[larger] > before.seconds[larger]


def test_the_search_for_merged_tokens_is_counted(
    vit_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most: it stops when the loss grows. Repairs are counted elsewhere."""
    work = context(vit_recipe, tmp_path)
    judged = sum(len(batch.rows) for batch in work.sources.curves)
    model, structure, plan = work.sources.model, work.structure, halved(work.structure)
    with counted(work, monkeypatch) as found:
        repair.share_budget(
            model,
            structure,
            work.sources.fixed(1),
            work.costs,
            work.sources.curves,
            lambda costs: plan,
            lambda plan: insert_merging(model, structure, find_tokens(model), plan.merged),
            macs=0.6,
            temperature=1.0,
            seed=0,
            unmerged=(plan, 1e9),
        )
    few = sum(len(batch.rows) for batch in work.sources.curves[::4])
    most = repair.merging_effort(len(structure.blocks), judged, Effort())
    steps = 3 * (len(structure.blocks) + 1) / 2
    assert 0.5 * most.forward < found["forward"] <= most.forward + steps * (few - judged / 4) + few + 20


def test_merging_that_may_be_needed_is_told(vit_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _fixed_speed(monkeypatch)
    found = forecast(context(vit_recipe, tmp_path, tokens={"keep": "if-needed"}))
    assert found.merging > found.seconds[
        "search"
    ] and "more, if units alone lose too much and the search merges tokens" in str(found)
    fixed = forecast(context(vit_recipe, tmp_path, tokens={"keep": 1.0}))
    assert fixed.merging == 0 and fixed.more == "" and fixed.seconds == found.seconds


def _fixed_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every forward pass takes 10 ms, every backward pass 20."""
    monkeypatch.setattr("optin_export.stages.forecast._passes", lambda *_: (0.01, 0.01, 0.02))
    monkeypatch.setattr("optin_export.stages.forecast._algebra", lambda: (1e-10, 1e-10))


def test_a_repeated_run_keeps_its_forecast(vit_recipe: Make, tmp_path: Path) -> None:
    work = context(vit_recipe, tmp_path)
    assert recall_forecast(work) is None
    found = remember_forecast(work)
    assert isinstance(found, Forecast) and recall_forecast(work) == found
    assert set(found.seconds) == {"scoring", "curves", "search", "surgery", "export", "measure"} and found.total > 0
    assert min(found.peak_bytes.values()) > 50 * 2**20
    assert recall_forecast(context(vit_recipe, tmp_path, seed=7)) is None
    (tmp_path / NAME).write_text("{", encoding="utf-8")
    assert recall_forecast(work) is None


def test_without_its_files_a_model_is_not_forecast(vit_recipe: Make, tmp_path: Path) -> None:
    raw = vit_recipe()
    raw["model"]["weights"] = str(tmp_path / "missing.safetensors")
    assert forecast_of(validate(raw, tmp_path)) is None


def test_a_dry_run_prints_the_forecast(vit_recipe: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(vit_recipe()), encoding="utf-8")
    line = [str(tmp_path / "recipe.yaml"), "--dry-run", "--out", str(tmp_path / "run")]
    assert cli.main(line) == 0
    text = capsys.readouterr().out
    assert "in all about" in text and "from a forward and a backward pass of" in text
    assert cli.main([*line, "--json"]) == 0
    stages = {one["name"]: one["estimate"] for one in json.loads(capsys.readouterr().out)["stages"]}
    assert all(
        stages[name]["kind"] == "forecast" and stages[name]["seconds"] is not None for name in ("scoring", "curves")
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("short_measurement")
def test_a_report_has_the_forecast_beside_what_it_took(
    vit_recipe: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxruntime")
    reports: list[Report] = []
    for _ in range(2):
        found = run(vit_recipe(), tmp_path / "run")
        assert found is not None
        reports.append(found)
    first, again = ({one.name: one for one in report.stages} for report in reports)
    assert first["scoring"].expected_seconds == again["scoring"].expected_seconds
    assert first["scoring"].first_seconds is None and again["scoring"].first_seconds == first["scoring"].seconds
    assert first["engines"].expected_seconds is None and first["search"].expected_seconds is not None
    assert first["curves"].expected_peak_bytes
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(vit_recipe()), encoding="utf-8")
    cli.main([str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "run")])
    expected = sum(one.expected_seconds or 0 for one in again.values())
    assert f"expected {expected:.0f} s" in capsys.readouterr().out
