"""Tables of docs/results.md from docs/measurements/<recipe>_<precision>.json, which benchmark_recipes.py writes
with --precision: both models in fp32 and in another precision, four engines in the same blocks."""

from __future__ import annotations

from typing import Any

from plots import faster, markdown_table

#: What pruning and int8 together should reach, by recipe, precision and MACs budget: times faster than the unpruned
#: fp32 engine and than the unpruned engine of the precision, and the points that may be lost.
TARGETS = {("minilm_sts", "int8", 0.3): (4.0, 2.4, 1.5)}
Gain = dict[str, float]


def table(measured: dict[str, Any]) -> list[str]:
    """Four rows per budget and batch size: base and pruned, in fp32 and in the precision."""
    rows, notes = [], []
    for result in measured["results"]:
        precision, accuracy = result["precision"], result["accuracy"]
        for one in result["latency"]:
            for name, times in one["engines_ms"].items():
                totals = [_gain(one, precision, name, against) for against in ("base", f"base.{precision}")]
                rows.append(
                    [
                        f"{result['macs']['ratio']:.1%}",
                        f"{one['batch']} x {one['sequence']}" if one["sequence"] else f"{one['batch']}",
                        name.replace(".", " ") if "." in name else f"{name} fp32",
                        f"{accuracy['engines'][name]:.2f}",
                        f"{times['p50']:.3g} ms",
                        *("-" if gain is None else faster(gain) for gain in totals),
                    ]
                )
        notes += _verdicts(measured["recipe"], result)
    precision = measured["results"][0]["precision"]
    metric = measured["results"][0]["accuracy"]["metric"]
    head = ["MACs kept", "batch", "engine", metric, "p50", "over base fp32", f"over base {precision}"]
    return [*markdown_table(head, rows), *(["", *notes] if notes else [])]


def form(result: dict[str, Any]) -> str:
    """How the graph was quantised, in words; empty for half precisions."""
    export = result["export"]
    if result["precision"] not in ("int8", "fp8"):
        return ""
    if export["quantization"] == "dynamic":
        return " (`quantization: dynamic`)"
    rows = f"{export['calibration_rows']} calibration rows"
    return f" (`quantization: {export['quantization']}`, `calibration: {export['calibration']}`, {rows})"


def _gain(one: dict[str, Any], precision: str, engine: str, against: str) -> Gain | None:
    """How many times faster; None where the two were not compared."""
    found = {(pair["engine"], pair["against"]): pair["speedup"] for pair in one["comparisons"]}
    found[f"pruned.{precision}", f"base.{precision}"] = one["speedup"]
    return found.get((engine, against))


def _verdicts(recipe: str, result: dict[str, Any]) -> list[str]:
    """Measured against the target, one line for each batch size: a gain counts by the lower end of its interval."""
    precision = result["precision"]
    target = TARGETS.get((recipe, precision, result["budget"]))
    if target is None:
        return []
    lines = []
    for one in result["latency"]:
        parts = []
        for against, least in zip(("base", f"base.{precision}"), target[:2], strict=True):
            gain = _gain(one, precision, f"pruned.{precision}", against)
            assert gain is not None
            missed = least - gain["ci_low"]
            verdict = "met" if missed <= 0 else f"missed by {missed:.2f}"
            parts.append(f"{gain['median']:.2f}x over {against.replace('.', ' ')} (target {least:.1f}x: {verdict})")
        drop = result["accuracy"]["drop"]
        verdict = "met" if drop <= target[2] else f"missed by {drop - target[2]:.2f}"
        parts.append(f"{drop:.2f} points lost (target {target[2]:.1f}: {verdict})")
        floor = 100 * one["noise_floor"]
        lines.append(
            f"- At {result['budget']:g} of the MACs, batch {one['batch']}, pruned {precision}: {', '.join(parts)}; "
            f"an engine against itself differs by up to {floor:.1f} %."
        )
    return lines
