"""docs/results.md and its plots, rendered from measurements made up here."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from tests.test_docs import load_tool

tool = load_tool("render_results")
accuracy, engines, marks = (load_tool(name) for name in ("render_accuracy", "render_engines", "marks"))


def row(scorer: str, repair: str, budget: float, seed: int, drop: float) -> dict[str, Any]:
    values = {"base": 90.0, "accuracy": 90.0 - drop, "drop": drop, "macs": budget}
    return {"scorer": scorer, "repair": repair, "budget": budget, "seed": seed, **values}


ROWS = [
    *(row("optin", "least-squares", 0.5, seed, drop) for seed, drop in enumerate((1.0, 1.2, 1.4))),
    *(row("fisher", "least-squares", 0.5, seed, drop) for seed, drop in enumerate((0.4, 0.5, 0.6))),
    *(row("magnitude", "least-squares", 0.5, seed, drop) for seed, drop in enumerate((0.9, 1.1, 1.3))),
    row("optin", "least-squares", 0.4, 0, 0.22),
    row("fisher", "least-squares", 0.4, 0, 2.0),
    row("fisher", "least-squares", 0.3, 0, 3.0),
    row("optin", "none", 0.5, 0, 40.0),
    row("fisher", "none", 0.5, 0, 30.0),
    row("novel", "rescale", 0.6, 0, -0.001),
]


@pytest.fixture
def measurements(tmp_path: Path) -> Path:
    (tmp_path / "accuracy").mkdir()
    about = {"metric": "spearman", "held_out_rows": 1500, "calibration_rows": 2048, "scoring_rows": 64, "torch": "2"}
    about |= {"curve_rows": 256}
    about |= {"machine": {"cpu": "A CPU", "threads": 1}, "written": "2030-01-01"}
    for case, rows in (("minilm-stsb", ROWS), ("resnet20-cifar10", ROWS[:1]), ("vit-cifar10", [])):
        content = json.dumps({"case": case, **about, "rows": rows})
        (tmp_path / "accuracy" / f"{case}.json").write_text(content, encoding="utf-8")
    speedup = {"median": 1.5, "ci_low": 1.4, "ci_high": 1.6}
    latency = {"target": "cpu", "sequence": 64, "base_ms": {"p50": 3.0}, "pruned_ms": {"p50": 2.0}, "speedup": speedup}
    result = {
        "budget": 0.5,
        "macs": {"ratio": 0.5},
        "params": {"ratio": 0.7},
        "accuracy": {
            "metric": "spearman",
            "base": 90.0,
            "pruned": 89.0,
            "drop": 1.0,
            "drop_low": 0.5,
            "drop_high": 1.5,
        },
        "latency": [{**latency, "batch": 1}, {**latency, "batch": 8}],
        "environment": {"cpu": "A CPU", "cpus": 2, "memory_gib": 4, "python": "3", "packages": {"torch": "2"}},
    }
    for name, content in {
        "minilm_sts": {"recipe": "minilm_sts", "results": [result]},
        "unknown": {"recipe": "unknown", "results": [result]},
        "scoring": {"rows": []},
        "listed": [],
    }.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return tmp_path


def test_cells_are_means_with_their_spread_and_the_best_is_bold(measurements: Path) -> None:
    page = tool.page(measurements)
    assert "| scorer | repair | 0.7 | 0.6 | 0.5 | 0.4 | 0.3 |" in page
    assert "| `optin` | least-squares | - | - | 1.20 ± 0.20 | **0.22** | - |" in page
    assert "| `fisher` | least-squares | - | - | **0.50 ± 0.10** | 2.00 | 3.00 |" in page
    assert "| `novel` | rescale | - | 0.00 | - | - | - |" in page  # alone in its column, and no negative zero
    assert "Spearman in points on 1500 held-out rows, unpruned 90.00; 2048 calibration rows, 64 of them" in page
    assert "seeds 0, 1, 2 (fewer in 6 of 9 cells); A CPU, 1 thread" in page


def test_targets_say_whether_they_are_met(measurements: Path) -> None:
    page = tool.page(measurements)
    assert (
        "| `minilm-stsb` | all rows, which also chose the defaults | - (target 0.0: not measured) "
        "| 1.20 (target 0.2: missed by 1.00) | 0.22 (target 0.3: met) | - (target 0.8: not measured) |"
    ) in page
    assert "met on all rows, which also chose the defaults: 1 of 2 measured" in page
    assert "`vit-cifar10`" not in page and "`resnet20-cifar10` |" not in page


def test_a_scorer_that_wins_is_named(measurements: Path) -> None:
    stsb, resnet = (case.main for case in tool.cases(measurements))
    # magnitude is ahead by less than the deviations; fisher without repair is not compared
    assert accuracy.losses(stsb) == [
        "Another scorer beats `optin` by more than both standard deviations (0 where one seed was measured) in 1 of 3 "
        "comparisons with the same repair:",
        "",
        "- At 0.5 of the MACs, `fisher` beats `optin` with least-squares repair: it loses 0.50 ± 0.10 points, "
        "`optin` 1.20 ± 0.20 (0.70 more).",
    ]
    assert accuracy.losses(resnet) == ["No other scorer has been measured with the same repair as `optin` yet."]


def halved(scorer: str, budget: float, choose: float, report: float, seed: int = 0) -> dict[str, Any]:
    """A row of today: with parts, and with its own machine."""
    parts = {
        name: {"base": base, "accuracy": base - drop, "drop": drop, "drop_low": drop - 0.5, "drop_high": drop + 0.5}
        for name, base, drop in (("choose", 88.0, choose), ("report", 92.0, report))
    }
    occasion = {"machine": {"cpu": "Another CPU", "threads": 2}, "torch": "3", "written": "2031-01-01"}
    whole = (choose + report) / 2
    return {**row(scorer, "least-squares", budget, seed, whole), "parts": parts, **occasion}


def add(measurements: Path, case: str, rows: list[dict[str, Any]], **facts: Any) -> None:
    path = measurements / "accuracy" / f"{case}.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    document |= {"case": case, "parts": {"choose": 700, "report": 800}, **facts}
    path.write_text(json.dumps({**document, "rows": [*document["rows"], *rows]}), encoding="utf-8")


def test_the_report_half_is_told_and_the_other_stands_apart(measurements: Path) -> None:
    rows = [halved("optin", 0.5, 0.1, 1.0), halved("optin", 0.5, 0.3, 1.4, seed=1), halved("fisher", 0.5, 0.05, 2.0)]
    add(measurements, "minilm-stsb", [*rows, halved("optin", 0.4, 0.0, 0.25)])
    page = tool.page(measurements)
    assert "Spearman in points on the 800 rows of the report half, of 1500 held-out rows, unpruned 92.00" in page
    assert "Another CPU, 2 threads, torch 3, 2031-01-01." in page
    assert "| `optin` | least-squares | - | - | **1.20 ± 0.28** (0.70 to 1.70) | 0.25 (-0.25 to 0.75) | - |" in page
    assert (
        "On the 700 rows of the choose half (unpruned 88.00): `optin` least-squares 0.20 ± 0.14 at 0.5, 0.00 at 0.4; "
        "`fisher` least-squares 0.05 at 0.5."
    ) in page
    # of the defaults on the half that chooses, fisher would be better here
    assert "the default loses no more in 0 of 1 comparisons" in page
    assert "| `minilm-stsb` | 0.5 | `optin` least-squares | 0.20 ± 0.14 | `fisher` least-squares | 0.05 |" in page
    for name in ("macs", "macs-2"):
        assert f"](figures/minilm-stsb-{name}.svg)" in page and f"minilm-stsb-{name}.svg" in tool.figures(measurements)


def test_older_rows_are_a_table_of_their_own_and_never_compared_with_newer_ones(measurements: Path) -> None:
    before = tool.page(measurements)
    add(measurements, "minilm-stsb", [halved("optin", 0.5, 0.1, 9.0)])
    [case] = [one for one in tool.cases(measurements) if one.name == "minilm-stsb"]
    assert [table.part for table in case.tables] == ["report", None]
    assert accuracy.losses(case.main) == ["No other scorer has been measured with the same repair as `optin` yet."]
    page = tool.page(measurements)
    old = "| `fisher` | least-squares | - | - | **0.50 ± 0.10** | 2.00 | 3.00 |"
    mark = "**On all rows, which also chose the defaults**: measured before the rows were split."
    assert before.count(old) == page.count(old) == 1
    start = page.index("### MiniLM-L6 on STS-B")
    assert page.index("9.00 (8.50 to 9.50)", start) < page.index(mark, start) < page.index(old, start)
    assert page.count(mark) == 2 and "A CPU, 1 thread, torch 2, 2030-01-01." in page


def test_rows_of_two_machines_are_two_tables(measurements: Path) -> None:
    occasion = {"machine": {"cpu": "A third CPU", "threads": 2}, "written": "2032-01-01"}
    other = {**halved("fisher", 0.5, 0.0, 0.0), **occasion}
    add(measurements, "minilm-stsb", [halved("optin", 0.5, 0.1, 1.0), other])
    [case] = [one for one in tool.cases(measurements) if one.name == "minilm-stsb"]
    assert [(table.part, list(table.lines)) for table in case.tables][:2] == [
        ("report", [("fisher", "least-squares")]),  # the newest machine first
        ("report", [("optin", "least-squares")]),
    ]
    assert len(case.tables) == 3


def test_targets_met_on_all_rows_only_are_named(measurements: Path) -> None:
    add(measurements, "minilm-stsb", [halved("optin", 0.4, -0.2, 0.5), halved("optin", 0.3, 0.7, 0.7)])
    page = tool.page(measurements)
    assert "met on the report half: 1 of 2 measured; met on all rows, which also chose the defaults: 1 of 2" in page
    assert "| `minilm-stsb` | report half |" in page and "| `minilm-stsb` | all rows, which" in page
    assert "0.50 (0.00 to 1.00; target 0.3: missed by 0.20) | 0.70 (0.20 to 1.20; target 0.8: met) |" in page
    assert (
        "- `minilm-stsb` at 0.4: missed on the report half (0.50), met on all rows (0.15) and by an older table of all "
        "rows (0.22)."
    ) in page


def test_rows_that_are_parts_of_training_texts_are_told_and_clean_ones_apart(measurements: Path) -> None:
    one = halved("optin", 0.5, 0.1, 1.0)
    for name, drop in (("clean", 3.0), ("clean_report", 2.0)):
        one["parts"][name] = {"base": 80.0, "accuracy": 80.0 - drop, "drop": drop, "drop_low": 1.0, "drop_high": 4.0}
    facts = {"held_out_rows": 1000, "training_texts": {"parts_of_training_texts": 891, "holding_one": 100}}
    parts = {"choose": 480, "report": 520, "clean": 109, "clean_report": 60}
    path = measurements / "accuracy" / "minilm-sst2.json"
    path.write_text((measurements / "accuracy" / "vit-cifar10.json").read_text(encoding="utf-8"), encoding="utf-8")
    add(measurements, "minilm-sst2", [one], **facts, parts=parts)
    content = (measurements / "minilm_sts.json").read_text(encoding="utf-8").replace("minilm_sts", "minilm_sst2")
    (measurements / "minilm_sst2.json").write_text(content, encoding="utf-8")
    page = tool.page(measurements)
    told = "**891 of the 1000 held-out rows (89.1%) are parts of texts that the model was fine-tuned on**"
    assert page.count(told) == 2  # above the clean rows, and above the engines
    assert "The other 109 are the clean rows; but 100 of them are sentences that hold a training text" in page
    assert "| its clean rows | 60 | 80.00 | - | - | 78.00, 2.00 lost (1.00 to 4.00) | - | - |" in page
    assert "| clean rows of both halves | 109 | 80.00 | - | - | 77.00, 3.00 lost (1.00 to 4.00) | - | - |" in page
    assert page.index(told) < page.index("### `recipes/minilm_sst2.yaml`") < page.rindex(told)
    assert "Clean rows have not been measured apart here." not in page
    add(measurements, "minilm-stsb", [], **facts)
    assert "Clean rows have not been measured apart here." in tool.page(measurements)
    assert "(#minilm-l6-on-sst-2-minilm-sst2)" in page and "### MiniLM-L6 on SST-2 (`minilm-sst2`)" in page


def test_unpruned_medians_that_differ_are_marked_above_the_table(measurements: Path) -> None:
    path = measurements / "minilm_sts.json"
    [result] = json.loads(path.read_text(encoding="utf-8"))["results"]

    def page_with(other: float) -> str:
        later = json.loads(json.dumps(result))
        later["latency"][1]["base_ms"]["p50"] = 3.0 * other  # batch 8 of the second row
        path.write_text(json.dumps({"recipe": "minilm_sts", "results": [result, later]}), encoding="utf-8")
        return tool.page(measurements)

    assert "Unpruned medians" not in page_with(1.09) and "Unpruned medians" not in page_with(1 / 1.09)
    for ratio in (1.11, 1 / 1.11):
        lines = page_with(ratio).splitlines()
        [at] = [place for place, line in enumerate(lines) if "**Unpruned medians differ by up to 11 %" in line]
        assert "(cpu, batch 8: " in lines[at] and "compare speedups, not milliseconds" in lines[at]
        assert lines[at + 1] == "" and lines[at + 2].startswith("| MACs kept |")
        assert lines[at - 2] == "### `recipes/minilm_sts.yaml`"


def test_batches_and_targets_are_not_held_against_each_other() -> None:
    assert marks.unequal([("cpu, batch 1", 1.0), ("cpu, batch 8", 8.0), ("gpu, batch 1", 0.1)]) == []
    assert marks.unequal([]) == []
    assert "cpu, batch 1: 1 to 1.2 ms" in marks.unequal([("cpu, batch 1", 1.0), ("cpu, batch 1", 1.2)])[0]


def test_studies_say_which_rows_their_points_are_of() -> None:
    old, new = {"drop": 1.0}, {"drop": 1.0, "half": "choose"}
    sentence, star = marks.halves([old])
    assert "on all held-out rows, the report half included" in sentence and star(old) == ""
    sentence, star = marks.halves([new])
    assert "that defaults are chosen by" in sentence and star(new) == ""
    sentence, star = marks.halves([old, new])
    assert "`*`: on all of them" in sentence and star(old) == " *" and star(new) == ""


def test_the_summary_has_the_worst_batch_and_minutes_of_the_default(measurements: Path) -> None:
    timed = row("optin", "least-squares", 0.5, 7, 1.0) | {
        "scoring_seconds": 60.0,
        "curves_seconds": 120.0,
        "surgery_seconds": 30.0,
    }
    stored = tool.recipes(measurements)
    [result] = stored["minilm_sts"]["results"]
    result["stages"] = [{"name": "measure", "seconds": 90.0}, {"name": "ship", "seconds": 999.0}]
    result["latency"][1]["speedup"] = {"median": 1.2, "ci_low": 1.1, "ci_high": 1.3}
    other = {**result, "budget": 0.3, "macs": {"ratio": 0.3}}
    stored["minilm_sts"]["results"].append(other)
    lines = engines.summary(stored, [tool.cases(measurements)[0]])
    assert "| MiniLM-L6 on STS-B | 50% | 1.00 (0.50 to 1.50) | 1.20x (1.10 to 1.30) | - | A CPU, 2 cores |" in lines
    path = measurements / "accuracy" / "minilm-stsb.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**document, "rows": [timed]}), encoding="utf-8")
    lines = engines.summary(stored, [tool.cases(measurements)[0]])
    assert "| MiniLM-L6 on STS-B | 50% | 1.00 (0.50 to 1.50) | 1.20x (1.10 to 1.30) | 5 | A CPU, 2 cores |" in lines
    assert engines.expectations(stored, [])[2:] == []  # neither 0.6 nor 0.4 was measured
    other["budget"] = 0.4
    assert engines.expectations(stored, [])[2:] == [
        "| MiniLM-L6 on STS-B | 30% | 1.00 (0.50 to 1.50) | 1.20x (1.10 to 1.30) | - |"
    ]


def test_only_files_with_results_are_recipes(measurements: Path) -> None:
    page = tool.page(measurements)
    assert list(tool.recipes(measurements)) == ["minilm_sts", "unknown"]
    assert "recipes/minilm_sts.yaml" in page and "`recipes/scoring" not in page and "`recipes/listed" not in page
    assert "unpruned 90.00 at 3 ms; 89.00 at 2 ms with 50% of the MACs](figures/minilm-stsb-latency.svg)" in page


def test_another_precision_has_four_rows_and_verdicts_of_its_targets(measurements: Path) -> None:
    def gain(middle: float) -> dict[str, float]:
        return {"median": middle, "ci_low": middle - 0.1, "ci_high": middle + 0.1}

    path = measurements / "minilm_sts.json"
    [result] = json.loads(path.read_text(encoding="utf-8"))["results"]
    names = ("base", "pruned", "base.int8", "pruned.int8")
    pairs = [("pruned.int8", "base", 4.2), ("base.int8", "base", 1.9), ("pruned", "base", 1.5), (*names[:0:-2], 1.7)]
    latency = {
        **result["latency"][0],
        "batch": 8,
        "noise_floor": 0.01,
        "engines_ms": {name: {"p50": 10.0 - place} for place, name in enumerate(names)},
        "comparisons": [{"engine": one, "against": other, "speedup": gain(value)} for one, other, value in pairs],
        "speedup": gain(2.2),
    }
    accuracy = {**result["accuracy"], "engines": {name: 90.0 - place for place, name in enumerate(names)}}
    export = {"quantization": "dynamic", "calibration": "minmax", "calibration_rows": 128}
    result |= {"budget": 0.3, "precision": "int8", "accuracy": accuracy, "latency": [latency], "export": export}
    stored = json.dumps({"recipe": "minilm_sts", "results": [result]})
    path.with_name("minilm_sts_int8.json").write_text(stored, encoding="utf-8")
    page = tool.page(measurements)
    assert "### `recipes/minilm_sts.yaml` in int8 (`quantization: dynamic`)" in page
    assert "| base fp32 | 90.00 | 10 ms | - | - |" in page
    assert "| base int8 | 88.00 | 8 ms | 1.90x (1.80 to 2.00) | - |" in page
    assert "| pruned int8 | 87.00 | 7 ms | 4.20x (4.10 to 4.30) | 2.20x (2.10 to 2.30) |" in page
    assert "4.20x over base (target 4.0x: met), 2.20x over base int8 (target 2.4x: missed by 0.30)" in page
    assert page.count("### `recipes/minilm_sts.yaml`\n") == 1  # the fp32 table is still its own


def test_figures_are_the_ones_on_the_page_and_reproducible(measurements: Path) -> None:
    plots, page = tool.figures(measurements), tool.page(measurements)
    assert sorted(plots) == ["minilm-stsb-latency.svg", "minilm-stsb-macs.svg", "resnet20-cifar10-macs.svg"]
    assert page.count("](figures/") == len(plots) and all(f"](figures/{name})" in page for name in plots)
    for svg in plots.values():
        assert ElementTree.fromstring(svg).tag.endswith("svg")
    assert tool.figures(measurements) == plots


def test_without_measurements_the_page_is_its_head(tmp_path: Path) -> None:
    assert tool.page(tmp_path).startswith("# Results") and "##" not in tool.page(tmp_path)
    assert tool.figures(tmp_path) == {}


def test_studies_are_rendered_with_what_is_required_of_them(tmp_path: Path) -> None:
    studies = tmp_path / "studies"
    studies.mkdir()
    sketch = [
        {"probes": probes, "seconds": seconds, "correlation_with_converged": [low, low + 0.01, low + 0.005]}
        for probes, seconds, low in ((4, 0.5, 0.95), (16, 2.0, 0.975))
    ]
    comparison = {
        "model": "small",
        "neurons": 64,
        "sentences": 3,
        "tokens": 30,
        "converged_probes": 256,
        "sketch": sketch,
        "exact_seconds": 90.0,
        "exact_measured_on": 8,
        "exact_correlation_with_converged": 0.9,
        "probes_compared": 16,
        "times_faster": 45.0,
    }
    width = [{"width": w, "units": 4 * w, "sketch_seconds": 0.3, "forward_seconds": 0.01} for w in (8, 16)]
    machine = {"cpu": "a processor", "threads": 2, "cores": 2}
    content = {"machine": machine, "torch": "2", "memory_times_training_step": 0.8, "comparison": comparison}
    (studies / "scoring.json").write_text(json.dumps({**content, "width": width}))
    row = {"case": "x", "budget": 0.5, "seed": 0}
    swaps = {"swaps": 50, "estimate": 1.0, "estimate_other_rows": 2.0, "drop_unrepaired": 3.0, "drop_repaired": 0.25}
    (studies / "joint_selection.json").write_text(json.dumps({"cpu": "a processor", "rows": [{**row, **swaps}]}))
    shared = {**row, "scorer": "optin", "samples": 2048}
    rounds = [{**shared, "rounds": count, "drop": 1.0 / count, "seconds": 60 * count} for count in (1, 2)]
    (studies / "rounds.json").write_text(json.dumps({"cpu": "a processor", "rows": rounds}))
    parts = [{**row, "left_out": part, "drop": drop} for part, drop in (("nothing", 1.0), ("the refit", 4.25))]
    (studies / "ablation.json").write_text(json.dumps({"cpu": "a processor", "rows": parts}))
    way = {**row, "way": "tau", "macs": 0.498, "merged": [4, 3], "base": 90.0, "accuracy": 89.25, "batch": 8}
    timed = {"base_ms": 1.0, "speedup": [1.9, 1.8, 2.0], "noise_floor": 0.04, "calibration_rows": 384}
    (studies / "tokens.json").write_text(json.dumps({"cpu": "a processor", "rows": [{**way, **timed}]}))
    plans = {
        name: {"drop": drop, "speedup": {"median": 1.5, "low": 1.4, "high": 1.6}, "macs": macs}
        for name, drop, macs in (("latency", 0.5, 0.62), ("macs", 0.75, 0.6))
    }
    clock = {
        "batch": 1,
        "asked": 1.5,
        "promised": 1.52,
        "latency_over_macs": {"median": 1.0, "low": 0.99, "high": 1.01},
    }
    versions = {"cpu": "a processor", "target": "t", "versions": {"torch": "2"}}
    (studies / "latency.json").write_text(json.dumps({**versions, "rows": [{"case": "x", **clock, **plans}]}))
    profile = [{"engine": one, "ms": {"MatMul": ms, "Softmax": 1.0}} for one, ms in (("base", 9.0), ("pruned", 3.0))]
    about = {"run": "x", "batch": 8, "macs": 0.3, "cpu": "a processor", "onnxruntime": "1", "calls": 3}
    (studies / "operators.json").write_text(json.dumps({**about, "rows": profile}))
    page = tool.page(tmp_path)
    assert "| the rest | 1.00 (10 %) | 1.00 (25 %) |" in page and "| sum | 10.00 (100 %) | 4.00 (100 %) |" in page
    assert "1.50x | 1.50x | 1.000 (0.990 to 1.010) | 62.0 % | 60.0 % | 0.50 | 0.75 |" in page
    assert "kept more accuracy in 1 of 1 rows: by +0.25" in page
    assert "| `x` | 0.5 | heads, neurons and tokens | 4+3 | 49.8 % | 0.75 | 1.90 (1.80 to 2.00) |" in page
    assert "| `x` | 0.5 | the refit | 4.25 |" in page
    assert "rank correlation 0.975 at the worst seed (required\n0.97: met)" in page
    assert "45 times faster (required 50:\nmissed)" in page
    assert "| 16 | 2.00 | 45 | 0.975 to 0.985 |" in page
    assert "| `x` | 0.5 | 50 | 1.0000 | 2.0000 | 3.00 | 0.25 |" in page
    assert "| `x` | 0.5 | `optin` | 2 | 2,048 | 0.50 | 120 |" in page
    assert set(tool.figures(tmp_path)) == {"scoring-width.svg"}
