"""The section of docs/results.md on gradients in bfloat16, from study_bfloat16.py."""

from __future__ import annotations

from typing import Any

from plots import section

TITLES = {
    "minilm-stsb": "MiniLM-L6, STS-B",
    "minilm-sst2": "MiniLM-L6, SST-2",
    "deit-tiny": "DeiT-Tiny, photos",
    "mpnet-stsb": "all-mpnet-base-v2",
}


def bfloat16(content: dict[str, Any]) -> list[str]:
    """Lines of the section."""
    rows = content["rows"]
    machines = sorted({f"{one['machine']['cpu']}, torch {one['machine']['torch']}" for one in rows})
    prose = [
        "`prune.autocast: auto` on a processor with instructions for bfloat16 (`tools/studies/study_bfloat16.py`):",
        "gradients from which scores, weights of the repair's rows and loss curves are estimated, in bfloat16 and",
        "in float32, by the same probes. *Ranks alike*: Spearman correlation between both, and in brackets by how",
        "much one value is off (median); for the curves the lower of both losses. *Kept otherwise*: share of the",
        "units kept by one plan and not by the other, at 70, 50 and 30 % of the MACs. CPU seconds of one thread.",
        f"{'; '.join(machines)}.",
    ]
    columns = ["model", "million parameters", "on a few rows", "scores", "weights", "curves", "kept otherwise"]
    columns += ["scores, s", "weights, s", "curves, s", "all"]
    return section("Gradients in bfloat16", prose, columns, [_line(one) for one in rows])


def _line(row: dict[str, Any]) -> list[str]:
    exact, fast = row["cpu_seconds"]["float32"], row["cpu_seconds"]["bfloat16"]
    worst = min(row["curves"].values(), key=lambda one: float(one["rank_correlation"]))
    return [
        TITLES.get(row["case"], row["case"]),
        f"{row['parameters'] / 1e6:.0f}",
        f"{row['agreement']:.4f}",
        *(f"{one['rank_correlation']:.4f} ({one['off']:.1%})" for one in (row["scores"], row["weights"], worst)),
        " / ".join(f"{share:.1%}" for share in row["kept_otherwise"].values()),
        *(f"{exact[key]:.0f} → {fast[key]:.0f}" for key in ("scores", "weights", "curves")),
        f"{sum(exact.values()) / sum(fast.values()):.2f}x",
    ]
