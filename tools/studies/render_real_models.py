"""The section of docs/results.md on trained models of real size, from study_real_models.py."""

from __future__ import annotations

import statistics
from collections import defaultdict
from typing import Any

from held_out import CHOOSE, REPORT
from plots import markdown_table, section

TITLES = {
    "deit-tiny": "DeiT-Tiny, ImageNet photos",
    "mpnet-stsb": "all-mpnet-base-v2, STS-B",
    "efficientnet-lite0": "EfficientNet-Lite0, ImageNet photos",
    "smollm2-wikitext2": "SmolLM2-135M, WikiText-2 (perplexity, % more)",
}
#: Points that may be lost, by model, way and share of MACs.
TARGETS: dict[tuple[str, str], dict[float, float]] = {
    ("deit-tiny", "default"): {0.7: 0.3, 0.6: 0.8, 0.5: 1.5, 0.4: 3.5},
    ("deit-tiny", "units"): {0.7: 5.0, 0.5: 15.0},
    ("deit-tiny", "units, distilled"): {0.7: 2.0, 0.5: 8.0},
    ("mpnet-stsb", "default"): {0.7: 0.0, 0.6: 0.1, 0.5: 0.3, 0.4: 0.8},
    ("efficientnet-lite0", "default"): {0.7: 0.5, 0.6: 1.0, 0.5: 2.0},
    ("smollm2-wikitext2", "default"): {0.7: 3.0, 0.6: 8.0, 0.5: 18.0},
}


def real_models(content: dict[str, Any]) -> list[str]:
    """Lines of the section."""
    groups: dict[tuple[str, str, float], list[dict[str, Any]]] = defaultdict(list)
    for row in content["rows"]:
        groups[row["case"], row["way"], row["budget"]].append(row)
    ordered = sorted(groups.items(), key=lambda item: (item[0][0], -item[0][2], item[0][1]))
    rows = [_line(*key, found) for key, found in ordered]
    facts = sorted({_fact(row) for row in content["rows"]})
    prose = [
        "The recipes of the product, run up to the repaired model (`tools/studies/study_real_models.py`). *default*:",
        "the recipe says nothing of tokens, which are then merged where units alone are predicted to lose too much;",
        "*units*: `tokens.keep: 1.0`; *heads and neurons*: also without dimensions of queries and keys, which the",
        "default rows of text models do not have (*with dimensions* does); *distilled*: with `prune.repair: distill`.",
        "Points lost: of the torch model on held-out rows, on the half that reports and on the half by which defaults",
        "may be chosen; the mean over seeds ± their deviation, and the mean of the 95 % intervals by paired bootstrap.",
        "*Predicted*: calibration rows with another class, before the repair, by the plan that was taken.",
        f"{'; '.join(facts)}.",
    ]
    columns = ["model", "MACs", "way", "points lost", "on the other half", "target", "predicted", "seeds", "CPU min"]
    return section("Trained models of real size", prose, columns, rows)


def expected(content: dict[str, Any]) -> list[str]:
    """Lines of the README: what the recipes' defaults lose on the half that reports."""
    groups: dict[tuple[str, float], list[dict[str, Any]]] = defaultdict(list)
    for row in content["rows"]:
        if row["way"] == "default":
            groups[row["case"], row["budget"]].append(row)
    lines = [
        [
            TITLES.get(case, case),
            f"{budget:.0%}",
            "yes" if any(any(row["merged"]) for row in found) else "no",
            _points(found, REPORT),
            f"{statistics.mean(row['cpu_seconds'] for row in found if row['cpu_seconds'] is not None) / 60:.0f}",
        ]
        for (case, budget), found in sorted(groups.items(), key=lambda item: (item[0][0], -item[0][1]))
    ]
    return markdown_table(["model", "MACs kept", "tokens merged", "points lost", "CPU minutes"], lines)


def _line(case: str, way: str, budget: float, found: list[dict[str, Any]]) -> list[str]:
    target = TARGETS.get((case, way), {}).get(budget)
    lost = statistics.mean(row["points"][REPORT]["drop"] for row in found)
    met = "-" if target is None else f"{target:g}: {'met' if lost <= target else f'missed by {lost - target:.2f}'}"
    trials = [row["predicted"] or {} for row in found]
    predicted = [one["changed"] for one in trials if one.get("changed") is not None]
    seconds = [row["cpu_seconds"] for row in found if row["cpu_seconds"] is not None]
    return [
        TITLES.get(case, case),
        f"{budget:g}",
        way,
        _points(found, REPORT),
        _points(found, CHOOSE),
        met,
        f"{statistics.mean(predicted):.1%}" if predicted else "-",
        ", ".join(str(row["seed"]) for row in found),
        f"{statistics.mean(seconds) / 60:.0f}" if seconds else "-",
    ]


def _points(found: list[dict[str, Any]], part: str) -> str:
    points = [row["points"][part] for row in found]
    drops = [one["drop"] for one in points]
    spread = f" ± {statistics.stdev(drops):.2f}" if len(drops) > 1 else ""
    low, high = (statistics.mean(one[end] for one in points) for end in ("drop_low", "drop_high"))
    return f"{statistics.mean(drops):z.2f}{spread} ({low:z.2f} to {high:z.2f})"


def _fact(row: dict[str, Any]) -> str:
    base, title = row["points"][REPORT], TITLES.get(row["case"], row["case"])
    return (
        f"{title}: {row['metric']}, {base['rows']} rows in the half that reports, unpruned {base['base']:.2f}, "
        f"{row['calibration_rows']} calibration rows, {row['machine']['cpu']}"
    )
