"""A run as trackers want it: flat parameters, flat numbers, and files."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from optin_export.recipe import engine_name
from optin_export.report.schema import Report, read_report
from optin_export.workdir.files import read_text

#: Characters that all trackers accept in a name.
_OTHER = re.compile(r"[^A-Za-z0-9_./-]+")
_FILES = ("report.html", "report.json", "recipe.yaml", "manifest.json", "plan/plan.json")


@dataclass(frozen=True)
class Values:
    """params: dotted field of the recipe -> its value as text. metrics: name -> number, with / between its parts.
    tags: facts in words. files: of the run folder, the shipped graph included."""

    name: str
    params: dict[str, str]
    metrics: dict[str, float]
    tags: dict[str, str]
    files: tuple[Path, ...]


def values_of(run: Path) -> Values:
    """Raises InputError if the run has no readable report."""
    report = read_report(run)
    recipe = yaml.safe_load(read_text(run / "recipe.yaml"))
    graph = f"onnx/{engine_name('pruned', report.precision)}.onnx"
    files = [run / name for name in (*_FILES, graph, f"{graph}.data")]
    return Values(
        report.name,
        {name: str(value) for name, value in _flat(recipe)},
        {_OTHER.sub("_", name): float(value) for name, value in _metrics(report)},
        {
            "verdict": report.verdict.outcome,
            "summary": report.verdict.summary,
            "model": report.model.get("source", ""),
            "optin_export": str(report.environment.get("optin_export", "")),
            "warnings": str(len(report.warnings)),
        },
        tuple(file for file in files if file.is_file()),
    )


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif value is not None:
            yield f"{prefix}{key}", value


def _metrics(report: Report) -> Iterator[tuple[str, float]]:
    """Numbers of the report; what was not evaluated is left out, not 0."""
    yield "passed", report.verdict.passed
    yield "quick", report.quick
    yield "macs_ratio", report.macs.ratio
    yield "params_ratio", report.params.ratio
    yield "parity/max_error", report.parity.max_error
    if report.accuracy is not None:
        for name in ("base", "pruned", "drop", "drop_low", "drop_high"):
            yield f"accuracy/{name}", getattr(report.accuracy, name)
    for one in report.latency:
        if one.judged:
            where = f"latency/{one.target}/batch_{one.batch}"
            yield f"{where}/base_p50_ms", one.base_ms.p50
            yield f"{where}/pruned_p50_ms", one.pruned_ms.p50
            yield f"{where}/speedup", one.judged_speedup.median
            yield f"{where}/speedup_low", one.judged_speedup.ci_low
            yield f"{where}/speedup_high", one.judged_speedup.ci_high
            yield f"{where}/noise_floor", one.noise_floor
    for gate in report.verdict.gates:
        if gate.measured is not None:
            yield f"gates/{gate.name}", gate.measured
    for stage in report.stages:
        yield f"seconds/{stage.name}", stage.seconds
