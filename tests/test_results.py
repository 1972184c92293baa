"""docs/results.md and its plots, rendered from measurements made up here."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from tests.test_docs import load_tool

tool = load_tool("render_results")


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
        "| `minilm-stsb` | - (target 0.0: not measured) | 1.20 (target 0.2: missed by 1.00) | 0.22 (target 0.3: met) "
        "| - (target 0.8: not measured) |"
    ) in page
    assert "met: 1 of 2 measured" in page
    assert "`vit-cifar10`" not in page and "`resnet20-cifar10` |" not in page


def test_a_scorer_that_wins_is_named(measurements: Path) -> None:
    stsb, resnet = tool.cases(measurements)
    # magnitude is ahead by less than the deviations; fisher without repair is not compared
    assert tool.losses(stsb) == [
        "Another scorer beats `optin` by more than both standard deviations (0 where one seed was measured) in 1 of 3 "
        "comparisons with the same repair:",
        "",
        "- At 0.5 of the MACs, `fisher` beats `optin` with least-squares repair: it loses 0.50 ± 0.10 points, "
        "`optin` 1.20 ± 0.20 (0.70 more).",
    ]
    assert tool.losses(resnet) == ["No other scorer has been measured with the same repair as `optin` yet."]


def test_only_files_with_results_are_recipes(measurements: Path) -> None:
    page = tool.page(measurements)
    assert list(tool.recipes(measurements)) == ["minilm_sts", "unknown"]
    assert "recipes/minilm_sts.yaml" in page and "scoring" not in page
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
