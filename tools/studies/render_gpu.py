"""The part of docs/results.md that comes from docs/measurements/gpu/*.json, written by tools/gpu_acceptance.py: one
section per GPU. What is not there is left out; what failed is listed with its reason."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import marks
from plots import faster, markdown_table


def sections(folder: Path) -> list[str]:
    """Lines of the page; none without a file of a full run."""
    lines: list[str] = []
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        if not content["rehearsal"]:
            lines += ["", *section(content, path.name)]
    return lines


def section(content: dict[str, Any], name: str) -> list[str]:
    """Scoring time, latency and what failed on one machine."""
    machine, by = content["machine"], content["measured_by"]
    lines = [
        f"## {machine['gpu']}",
        "",
        f"By `tools/gpu_acceptance.py` on {content['written']} ([raw blocks](measurements/gpu/{name})): "
        f"random weights, {by['blocks']} interleaved blocks of {by['block_seconds']:g} s per engine. `call` is what a "
        "caller sees, inputs and outputs copied; `device+graph` the engine alone, replayed as a CUDA graph. torch "
        f"{machine['packages'].get('torch', '-')}, {machine['cpu']}.",
    ]
    for part, render in (("scoring", _scoring), ("latency", _latency), ("failed", _failed)):
        found = render(content)
        if found:
            lines += ["", f"### {part.capitalize()}", "", *found]
    return lines


def cells(content: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every entry of every part, those within an entry as well."""
    for part, result in content["parts"].items():
        for entry in result["entries"]:
            yield {"part": part, **entry}
            for cell in entry.get("cells", ()):
                yield {"part": part, **cell}


def _scoring(content: dict[str, Any]) -> list[str]:
    rows = [
        [
            one["model"],
            one["autocast"] or "fp32",
            str(one["units"]),
            f"{one['info']['probes']:.0f}",
            f"{one['seconds']:.2f} s",
            f"{one['exact_seconds']:.1f} s",
            f"{one['exact_seconds'] / one['seconds']:.0f}",
        ]
        for one in cells(content)
        if one["part"] == "scoring" and "seconds" in one
    ]
    columns = [
        "model",
        "passes in",
        "units",
        "probes",
        "`score: optin`",
        "exact masking of all (scaled)",
        "times faster",
    ]
    return markdown_table(columns, rows) if rows else []


def _latency(content: dict[str, Any]) -> list[str]:
    rows, unpruned = [], []
    for one in cells(content):
        if "latency" not in one:
            continue
        found, speedup = one["latency"], one["latency"]["speedup"]
        words = f"{one['model']} on {one['target']}, {one['precision']}, batch {one['batch']}, {one['mode']}"
        unpruned.append((words, found["base_ms"]["p50"]))
        rows.append(
            [
                one["model"],
                one["target"],
                one["precision"],
                f"{one['macs']:g}",
                str(one["batch"]),
                one["mode"],
                f"{found['base_ms']['p50']:.3g} ms",
                f"{found['pruned_ms']['p50']:.3g} ms",
                " to ".join(f"{1000 * one['batch'] / found[arm]['p50']:.0f}" for arm in ("base_ms", "pruned_ms")),
                faster(speedup),
                f"{speedup['median'] * one['macs']:.2f}",
            ]
        )
    columns = ["model", "target", "precision", "MACs kept at most", "batch", "call", "unpruned p50", "pruned p50"]
    # Calls follow one another on one stream, so this is what one client gets, not what a server can give.
    columns.append("rows per second, call after call")
    table = markdown_table([*columns, "speedup", "speedup x MACs kept"], rows)
    return [*marks.unequal(unpruned), *table] if rows else []


def _failed(content: dict[str, Any]) -> list[str]:
    """Parts that ended early, and what was not measured, by reason."""
    lines = [f"- {part}: {result['failed']}" for part, result in content["parts"].items() if result["failed"]]
    reasons: dict[str, int] = {}
    for one in cells(content):
        reason = one.get("failed") or one.get("unmeasured")
        if reason:
            key = f"{one['part']}: {' '.join(reason.split())[:200]}"
            reasons[key] = reasons.get(key, 0) + 1
    return lines + [f"- {reason} ({count})" for reason, count in reasons.items()]
