"""Runs side by side: fronts that never mix machines, batches or evaluation data, and what cannot be compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from optin_export.cli import main
from optin_export.errors import InputError
from optin_export.report.compare import compare, mark
from optin_export.report.tradeoff import Point
from tests.report.test_html import Page, latency_result, make_report

RECIPE = (
    "recipe: 1\nname: {name}\nprune: {{units: [heads], budget: {{macs: {macs}}}}}\ntargets: [{{engine: onnxruntime}}]\n"
)


def finished(folder: Path, *, points: float = 81.56, ms: float = 5.0, macs: float = 0.5, **changes: Any) -> Path:
    """A run folder with a report of so many points at so many milliseconds."""
    folder.mkdir(parents=True)
    report = make_report()
    accuracy = report.accuracy
    assert accuracy is not None
    drop = accuracy.base - points
    given = {**accuracy.model_dump(), "pruned": points, "drop": drop, "drop_low": drop - 0.5, "drop_high": drop + 0.5}
    latency = [{**latency_result(1), "pruned_ms": {"p50": ms, "p90": ms, "p99": ms}}]
    fields = {"name": folder.name, "accuracy": given, "latency": latency, **changes}
    (folder / "report.json").write_text(make_report(**fields).model_dump_json())
    (folder / "recipe.yaml").write_text(RECIPE.format(name=folder.name, macs=macs))
    return folder


def test_the_front_is_what_no_other_run_beats(tmp_path: Path) -> None:
    runs = [
        finished(tmp_path / "fast", points=80.0, ms=3.0),
        finished(tmp_path / "good", points=82.0, ms=5.0),
        finished(tmp_path / "beaten", points=79.0, ms=4.0, macs=0.7),
    ]
    found = compare(runs, tmp_path / "page.html")
    (group,) = found.groups
    (front,) = group.fronts
    shown = {point.label: point.front for point in front.points}
    assert shown == {"fast": True, "good": True, "beaten": False, "unpruned": True}
    # Each run measured the same unpruned model: its point is the median of these.
    (unpruned,) = (point for point in front.points if point.model == "base")
    assert (unpruned.cost, unpruned.accuracy) == pytest.approx((8.1234, 82.03))
    assert front.points[1].low == pytest.approx(81.5) and front.points[1].high == pytest.approx(82.5)
    assert group.differences == {"prune.budget.macs": ("0.5", "0.5", "0.7")}
    assert group.kept[0, "heads"] == ((6, 12),) * 3
    parsed = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert parsed.empty_cells == 0 and "prune.budget.macs" in parsed.text
    assert sum(tag == "caption" for tag, _ in parsed.tags) == sum(tag == "table" for tag, _ in parsed.tags)


def test_of_equals_all_are_on_the_front_and_perplexity_is_better_lower() -> None:
    points = (Point("a", 1.0, 5.0), Point("b", 1.0, 5.0), Point("c", 2.0, 4.0), Point("d", 2.0, 6.0))
    assert [one.front for one in mark(points, lower_is_better=True)] == [True, True, True, False]
    assert [one.front for one in mark(points, lower_is_better=False)] == [True, True, False, True]


def test_machines_targets_and_batches_have_fronts_of_their_own(tmp_path: Path) -> None:
    runs = [
        finished(tmp_path / "a"),
        finished(tmp_path / "b", environment={"cpu": "another", "cpus": 1}),
        finished(tmp_path / "c", latency=[{**latency_result(8), "target": "torch-cpu"}]),
        finished(tmp_path / "d", latency=[]),
    ]
    (group,) = (found := compare(runs, tmp_path / "page.html")).groups
    assert len(group.fronts) == 3 and all(len(front.points) == 2 for front in group.fronts)
    assert group.unmeasured == {"d": "no latency was measured"}
    assert any("different machines" in warning for warning in found.warnings)
    assert "d is on no front" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_other_tasks_metrics_and_evaluation_data_are_groups_with_a_warning(tmp_path: Path) -> None:
    runs = [finished(tmp_path / name) for name in ("a", "b")]
    (runs[1] / "manifest.json").write_text(json.dumps({"inputs": {"evaluation": "another"}}))
    runs.append(finished(tmp_path / "c", model={"task": "text-classification"}, accuracy=None))
    found = compare(runs, tmp_path / "page.html")
    assert [[run.label for run in group.runs] for group in found.groups] == [["a"], ["b"], ["c"]]
    assert "not compared" in found.warnings[0]


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    runs = [finished(tmp_path / where / "x", name="same") for where in ("one", "two")]
    runs.append(finished(tmp_path / "y", name="other"))
    labels = [run.label for group in compare(runs, tmp_path / "page.html").groups for run in group.runs]
    assert labels == [str(run.resolve()) for run in runs]
    (tmp_path / "one" / "x").rename(tmp_path / "one" / "z")
    labels = [r.label for g in compare([tmp_path / "one" / "z", *runs[1:]], tmp_path / "p.html").groups for r in g.runs]
    assert labels == ["same (z)", "same (x)", "other"]


@pytest.mark.parametrize("case", ["one", "twice", "missing", "file", "no run", "unfinished", "damaged", "nested"])
def test_what_is_no_comparison_is_refused_and_nothing_is_written(tmp_path: Path, case: str) -> None:
    good, bad, page = finished(tmp_path / "good"), tmp_path / "bad", tmp_path / "page.html"
    if case not in ("missing", "file"):
        bad.mkdir()
    if case == "file":
        bad.write_text("")
    if case == "unfinished":
        (bad / "recipe.yaml").write_text("recipe: 1")
    if case in ("damaged", "nested"):
        (bad / "report.json").write_text((good / "report.json").read_text()[:-9] if case == "damaged" else "[" * 99999)
    given = {"one": [good], "twice": [good, tmp_path / "bad" / ".." / "good"]}.get(case, [good, bad])
    told = {
        "one": "nothing to compare",
        "twice": "given 2 times",
        "missing": "no such folder",
        "file": "it is a file",
        "no run": "not a run folder",
        "unfinished": "not finished",
    }.get(case, "cannot read")
    with pytest.raises(InputError, match=told):
        compare(given, page)
    assert not page.exists()


def test_an_unreadable_recipe_is_said_and_hostile_names_stay_text(tmp_path: Path) -> None:
    hostile = "<script>alert(1)</script>"
    runs = [finished(tmp_path / "a", name=hostile), finished(tmp_path / "b")]
    (runs[1] / "recipe.yaml").write_text("{")
    found = compare(runs, tmp_path / "page.html")
    assert any("b: its recipe.yaml cannot be read" in warning for warning in found.warnings)
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<script" not in page and hostile in Page(page).text


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [str(finished(tmp_path / "a")), str(finished(tmp_path / "b", warnings=["few rows", "\x1b[2J"]))]
    page = tmp_path / "page.html"
    assert main(["compare", *runs, "--out", str(page), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["page"] == str(page) and len(said["groups"][0]["fronts"][0]["points"]) == 3
    assert main(["compare", *runs, "--out", str(page)]) == 0
    printed = capsys.readouterr().out
    assert "on the front of spearman" in printed and "a: warning" not in printed
    assert "b: warning: few rows\nb: warning: \\u001b[2J\n" in printed
    assert main(["compare", *runs, "--out", str(tmp_path)]) == 2
    assert main(["compare", runs[0]]) == 2
    assert "error: nothing to compare" in capsys.readouterr().err
