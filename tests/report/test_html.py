"""The HTML report: well-formed, loads nothing, escapes everything, complete, and the same for the same input."""

from __future__ import annotations

import html
import json
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from optin_export.errors import InputError
from optin_export.report.html import count, gate_measured, layer_rows, milliseconds, number, points, render_html
from optin_export.report.schema import GateResult, Report

TARGET = "onnxruntime-cpu-1t"
VOID = {"meta", "link", "br", "hr", "img", "input"}
BLOCKS, HEADS, NEURONS = 4, 12, 64


def make_report(**changes: Any) -> Report:
    """A small report with synthetic numbers."""
    groups = [
        {
            "block": block,
            "kind": kind,
            "count": total,
            "kept": total // (2 + block % 2),
            "score_kept": 0.93 - 0.02 * block,
            "error_before": 2e-3 * (block + 1),
            "error_after": 4e-4 * (block + 1),
        }
        for block in range(BLOCKS)
        for kind, total in (("heads", HEADS), ("neurons", NEURONS))
    ]
    gates = [
        gate("parity", "<= 0.0001", 2.3e-6, kind="parity"),
        gate("budget.macs", "<= 0.5", 0.4988),
        gate("speedup", ">= 1.3", 1.62),
        gate("accuracy_drop", "<= 1", 0.47),
    ]
    fields: dict[str, Any] = {
        "name": "minilm-sts",
        "created": "2025-01-02T03:04:05+00:00",
        "verdict": {"passed": True, "summary": "PASSED: 1.62x faster & 0.47 points lost.", "gates": gates},
        "model": {"source": "hf:example/model", "task": "feature-extraction"},
        "macs": {"base": 1_360_000_000, "pruned": 678_400_000, "ratio": 0.4988},
        "params": {"base": 22_600_000, "pruned": 17_300_000, "ratio": 0.7655},
        "accuracy": {
            "metric": "spearman",
            "rows": 1379,
            "base": 82.03,
            "pruned": 81.56,
            "drop": 0.47,
            "drop_low": -0.11,
            "drop_high": 1.02,
        },
        "parity": {
            "passed": True,
            "tolerance": 1e-4,
            "max_error": 2.3e-6,
            "cases": [
                {
                    "target": TARGET,
                    "model": model,
                    "batch": 1,
                    "rows": "distinct",
                    "max_error": 2.3e-6,
                    "spread": 0.0,
                    "passed": True,
                }
                for model in ("base", "pruned")
            ],
        },
        "latency": [latency_result(1), latency_result(8)],
        "pruning": {
            "family": "bert",
            "method": "optin",
            "info": {"lambda": 0.731, "probes": 64.0, "neuron_rank_stability": 0.94},
            "budget": {"macs": 0.5},
            "compensated": True,
            "masked_difference": 3.1e-7,
            "optimality_gap": 0.0012,
            "groups": groups,
        },
        "engines": [
            {"target": TARGET, "model": model, "build_seconds": 1.23, "facts": {"bytes": 90_000_000, "threads": 1}}
            for model in ("base", "pruned")
        ],
        "stages": [
            {"name": "scoring", "seconds": 61.4, "reused": False},
            {"name": "search", "seconds": 0.21, "reused": True},
        ],
        "environment": {"python": "3.11.2", "cpus": 2, "packages": {"torch": "2.9.0"}},
    }
    return Report.model_validate({**fields, **changes})


def gate(
    name: str, required: str, measured: float | None, *, passed: bool = True, kind: str = "gate"
) -> dict[str, Any]:
    note = f"note on {name}"
    relation, limit = required.split()
    condition = {"relation": relation, "required": float(limit)}
    return {"name": name, "kind": kind, **condition, "measured": measured, "passed": passed, "note": note}


def latency_result(batch: int) -> dict[str, Any]:
    return {
        "target": TARGET,
        "batch": batch,
        "sequence": 64,
        "base_ms": {"p50": 8.1234 * batch, "p90": 8.6 * batch, "p99": 9.9 * batch},
        "pruned_ms": {"p50": 4.9876 * batch, "p90": 5.2 * batch, "p99": 6.1 * batch},
        "speedup": {"median": 1.6287, "ci_low": 1.62, "ci_high": 1.64},
        "noise_floor": 0.012,
        "blocks": 24,
    }


def test_ways_of_calling_on_a_gpu_are_shown_beside_the_judged_one(run: Path) -> None:
    memory = {"base": {"model": 3 << 20, "activations": 1 << 20}, "pruned": {"model": 1 << 20, "activations": 0}}
    on_gpu = {"target": "torch-cuda", "memory": memory, "clocks": {"sm_mhz": (1500.0, 1980.0)}}
    judged = {**latency_result(1), **on_gpu, "unmeasured": {"device+graph": "<cannot> be captured"}}
    other = {**latency_result(1), **on_gpu, "mode": "device", "judged": False}
    page = html.unescape(re.sub(r"\s+", " ", render_html(make_report(latency=[judged, other]), run)))
    assert "copies in and out (judged)" in re.sub("<.*?>", "", page) and ">no copies</td>" in page
    assert "not measured: <cannot> be captured" in page and "<cannot>" not in render_html(make_report(), run)
    assert "base: 3.0, 1.0; pruned: 1.0, 0.0" in page and "1500 to 1980" in page
    assert page.count("rowgroup") == render_html(make_report(latency=[judged]), run).count("rowgroup")
    assert "On the GPU" not in render_html(make_report(), run)


def test_a_busy_machine_is_told_beside_the_noise_floor(run: Path) -> None:
    busy = {**latency_result(1), "neighbours": {"others": 0.42, "stolen": 0.031}}
    page = re.sub(r"\s+", " ", render_html(make_report(latency=[busy]), run))
    assert "other work 45.1 %" in page and not re.search(r"other work \d", render_html(make_report(), run))


def test_layers_of_base_and_pruned_engines_are_compared(run: Path) -> None:
    def engine(target: str, model: str, **facts: int) -> dict[str, Any]:
        return {"target": target, "model": model, "build_seconds": 1.0, "facts": facts}

    engines = [
        engine("tensorrt-cuda", "base", network_layers=300, layers=40, fused_attention=12),
        engine("tensorrt-cuda", "pruned", network_layers=280, layers=90, fused_attention=0),
        engine("tensorrt-rtx-cuda", "base", network_layers=300),
        engine(TARGET, "base", bytes=1),
    ]
    report = make_report(engines=engines)
    assert [row["lost"] for row in layer_rows(report.engines)] == [False, True, False]
    page = re.sub(r"\s+", " ", re.sub("<.*?>", " ", render_html(report, run)))
    assert "tensorrt-cuda pruned 280 90 0 lost" in page and "tensorrt-cuda base 300 40 12 tensorrt" in page
    assert "Fused attention" not in render_html(make_report(), run)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with the files the report reads."""
    generator = np.random.default_rng(0)
    for folder in ("measure", "scores"):
        (tmp_path / folder).mkdir()
    entries = []
    for batch in (1, 8):
        arms = {"base": 8.0, "again": 8.0, "pruned": 5.0}
        samples = {arm: (ms * batch * generator.gamma(400, 1 / 400, (24, 15))).tolist() for arm, ms in arms.items()}
        entries.append({**latency_result(batch), "samples": samples})
    (tmp_path / "measure" / "latency.json").write_text(json.dumps(entries))
    scores = {
        f"block{block:02d}.{kind}": generator.lognormal(-6, 2, total)
        for block in range(BLOCKS)
        for kind, total in (("heads", HEADS), ("neurons", NEURONS))
    }
    save_file(scores, tmp_path / "scores" / "scores.safetensors")
    (tmp_path / "recipe.yaml").write_text("recipe: 1\nname: a & b <c>\n")
    return tmp_path


class Page(HTMLParser):
    """Collects what the tests ask for, and asserts that every element is closed in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.empty_cells = 0
        self._cell: str | None = None
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        assert len(dict(attrs)) == len(attrs), f"an attribute of {tag} is given twice"
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("td", "th", "dd"):
            self._cell = ""

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if tag in ("td", "th", "dd"):
            self.empty_cells += not (self._cell or "").strip()
            self._cell = None

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data
        if self._cell is not None:
            self._cell += data

    def values(self, *names: str) -> list[str]:
        return [attrs[name] or "" for _, attrs in self.tags for name in names if name in attrs]


def test_the_whole_report(run: Path) -> None:
    report = make_report()
    page = render_html(report, run)
    parsed = Page(page)
    assert page.startswith("<!DOCTYPE html>")
    assert html.escape(report.verdict.summary) in page
    assert "1.62x faster & 0.47 points lost." in parsed.text and "✔ PASSED" in parsed.text
    for one in report.verdict.gates:
        assert one.name in parsed.text and one.condition in parsed.text and one.note in parsed.text
    for shown in ("8.12 ms", "4.99 ms", "1.63x", "± 1.2 %", "1.36 GMACs", "22.6 M", "82.03 points", "+0.47 points"):
        assert shown in parsed.text, shown
    assert "−0.11 points to +1.02 points" in parsed.text
    assert "optin-export recipe.yaml" in parsed.text and "name: a & b <c>" in parsed.text
    assert parsed.empty_cells == 0
    plots = [attrs for tag, attrs in parsed.tags if tag == "svg"]
    assert len(plots) == 6
    assert all(attrs["role"] == "img" and attrs["aria-label"] for attrs in plots)
    assert ("html", {"lang": "en"}) in parsed.tags
    assert sum(tag == "caption" for tag, _ in parsed.tags) == sum(tag == "table" for tag, _ in parsed.tags)
    assert all("scope" in attrs for tag, attrs in parsed.tags if tag == "th")


def test_what_a_reader_wants_first_comes_first(run: Path) -> None:
    report = make_report(warnings=["other work"], quick=True)
    text = Page(render_html(report, run)).text
    order = [
        *("✔ PASSED (quick)", "1 warning", "no measurable difference in spearman (82.03 to 81.56; 95 % interval"),
        *(
            "8.12 to 4.99 ms (median call on",
            "are left",
            "Measure it fully",
            "optin-export ship . --to",
            "Make it smaller",
        ),
        "What was required",
    ]
    places = [text.index(one) for one in order]
    assert places == sorted(places)


def test_nothing_is_loaded(run: Path) -> None:
    page = render_html(make_report(), run)
    parsed = Page(page)
    loads = parsed.values("src", "href", "xlink:href", "action", "data", "poster", "srcset")
    loads += re.findall(r"url\(\s*['\"]?([^)'\"]*)", page)
    assert loads and all(load.startswith(("#", "data:image/png;base64,")) for load in loads)
    assert not {tag for tag, _ in parsed.tags} & {"script", "link", "iframe", "object", "embed"}
    assert "@import" not in page and "@font-face" not in page


def test_ids_are_unique_and_references_resolve(run: Path) -> None:
    page = render_html(make_report(), run)
    ids = Counter(Page(page).values("id"))
    assert max(ids.values()) == 1
    assert set(re.findall(r"(?:href=\"#|url\(#)([^\")]+)", page)) <= set(ids)


def test_the_same_input_gives_the_same_page(run: Path) -> None:
    assert render_html(make_report(), run) == render_html(make_report(), run)


def test_text_in_plots_takes_the_colour_of_the_page(run: Path) -> None:
    page = render_html(make_report(), run)
    assert "currentColor" in page and "#123456" not in page


def test_hostile_names_are_escaped(run: Path) -> None:
    hostile = "<script>alert(1)</script>"
    verdict = {"passed": False, "summary": f"FAILED: {hostile}", "gates": [gate(hostile, "<= 1", 1.0, passed=False)]}
    latency = [{**latency_result(1), "target": f"{hostile} $x$"}]
    group = {"block": 0, "kind": f'{hostile}"', "count": 2, "kept": 1, "score_kept": 0.5}
    pruning = {**make_report().pruning.model_dump(), "groups": [group]}
    changes = {"name": hostile, "verdict": verdict, "latency": latency, "pruning": pruning, "model": {hostile: hostile}}
    page = render_html(make_report(**changes, environment={hostile: {hostile: hostile}}), run)
    assert "<script" not in page
    parsed = Page(page)
    assert parsed.text.count(hostile) >= 8 and "✘ FAILED" in parsed.text


def test_missing_files_leave_their_plots_out(tmp_path: Path) -> None:
    page = render_html(make_report(), tmp_path)
    labels = [attrs["aria-label"] or "" for tag, attrs in Page(page).tags if tag == "svg"]
    assert len(labels) == 4 and not any("distribution" in label or "Importance" in label for label in labels)
    assert "recipe.yaml, as resolved" not in page


def test_a_broken_file_is_named(run: Path) -> None:
    (run / "measure" / "latency.json").write_text("[")
    with pytest.raises(InputError, match=r"latency\.json"):
        render_html(make_report(), run)


def test_what_was_not_measured_is_called_so(tmp_path: Path) -> None:
    verdict = {"passed": False, "summary": "FAILED.", "gates": [gate("speedup", ">= 1.3", None, passed=False)]}
    pruning = {**make_report().pruning.model_dump(), "compensated": False}
    pruning["groups"] = [{**group, "error_before": None, "error_after": None} for group in pruning["groups"]]
    changes = {"accuracy": None, "latency": [], "engines": [], "stages": [], "verdict": verdict, "pruning": pruning}
    parsed = Page(render_html(make_report(**changes), tmp_path))
    assert parsed.empty_cells == 0
    assert "not evaluated: the recipe names no evaluation data" in parsed.text
    # gate, latency, stages, engines, accuracy, and two errors for each group
    assert parsed.text.count("not evaluated") >= 5 + 4 * BLOCKS


def test_degenerate_scores_and_groups_render(run: Path) -> None:
    scores = {"block00.heads": np.zeros(12), "block00.neurons": np.ones(8), "other": np.ones(3)}
    save_file(scores, run / "scores" / "scores.safetensors")
    pruning = {**make_report().pruning.model_dump(), "groups": []}
    page = render_html(make_report(pruning=pruning, latency=[{**latency_result(1), "sequence": None}]), run)
    assert len([tag for tag, _ in Page(page).tags if tag == "svg"]) == 4


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.05123, "0.0512 ms"),
        (3.456, "3.46 ms"),
        (9.996, "10.0 ms"),
        (128.4, "128 ms"),
        (1234.5, "1230 ms"),
        (0, "0 ms"),
    ],
)
def test_milliseconds_have_three_significant_digits(value: float, text: str) -> None:
    assert milliseconds(value) == text


def test_numbers() -> None:
    assert count(999_900_000, "MACs") == "1.00 GMACs" and count(512) == "512" and count(None) == "not evaluated"
    assert points(-0.5) == "−0.50 points" and points(None) == "not evaluated"
    assert number(None) == "not evaluated" and number(True) == "yes" and number([1, 2]) == "1, 2"


@pytest.mark.parametrize(
    ("required", "measured", "passed", "text"),
    [(">= 1.3", 1.2996, False, "1.2996x"), (">= 1.3", 1.30004, True, "1.30x"), (">= 1.3", 1.62, True, "1.62x")],
)
def test_rounding_does_not_contradict_the_verdict(required: str, measured: float, passed: bool, text: str) -> None:
    assert gate_measured(GateResult(**gate("speedup", required, measured, passed=passed))) == text


@pytest.mark.parametrize(
    ("output", "told"),
    [
        ({"before": 0.25, "after": 0.19, "damping": 1.0, "fallback": None}, "0.25 before, 0.19 after"),
        ({"before": None, "after": None, "damping": None, "fallback": "<too few>"}, "because &lt;too few&gt;"),
        (None, None),
    ],
)
def test_the_refit_to_the_output_is_told(run: Path, output: dict[str, Any] | None, told: str | None) -> None:
    pruning = {**make_report().pruning.model_dump(), "output": output}
    text = re.sub(r"\s+", " ", render_html(make_report(pruning=pruning), run))
    assert (told in text) if told is not None else ("Gains and biases" not in text)
