"""Read finished runs for a comparison: their reports and recipes, grouped into comparable ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from optin_export.errors import InputError
from optin_export.recipe.strict_yaml import parse_yaml
from optin_export.report.schema import AccuracyResult, LatencyResult, Report
from optin_export.workdir.files import MAX_TEXT, read_json, read_text

#: Larger than any report.
LARGEST = 64 << 20


@dataclass(frozen=True)
class Run:
    """label: unique among the compared runs. recipe: "section.field" -> value as text; empty without a readable recipe.
    evaluation: hash of the evaluation data from the manifest, or ""."""

    label: str
    folder: Path
    report: Report
    recipe: Mapping[str, str]
    evaluation: str

    @property
    def kind(self) -> tuple[str, str | None, int, str]:
        """Task, metric, rows and evaluation data; runs that differ in any of these are not compared with each other."""
        accuracy = self.report.accuracy
        task = self.report.model.get("task", "no task")
        return (task, accuracy.metric, accuracy.rows, self.evaluation) if accuracy else (task, None, 0, "")

    def timed(self) -> list[tuple[str, AccuracyResult | None, LatencyResult]]:
        """(machine, accuracy on it or else the run's own, latency) of every judged measurement, on every machine."""
        own = self.report.accuracy
        found = [(machine_of(self.report.environment), own, one) for one in self.report.latency]
        found += [(far.machine, far.accuracy or own, one) for far in self.report.elsewhere for one in far.latency]
        return [one for one in found if one[2].judged]


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read the runs in these folders. Raises InputError for fewer than two folders, a duplicate, a folder without a
    finished run, or a damaged report."""
    if len(folders) < 2:
        raise InputError("nothing to compare", f"{len(folders)} run folder was given", "give two or more run folders")
    resolved = [folder.resolve() for folder in folders]
    for path, times in Counter(resolved).items():
        if times > 1:
            raise InputError(f"{path} was given {times} times", "a run cannot be compared with itself", "give it once")
    reports = [_report(folder) for folder in folders]
    labels = _labels([report.name for report in reports], resolved)
    return [
        Run(label, folder, report, _recipe(folder / "recipe.yaml"), _evaluation(folder / "manifest.json"))
        for label, folder, report in zip(labels, folders, reports, strict=True)
    ]


def machine_of(environment: Mapping[str, Any]) -> str:
    """The hardware that latency depends on: the GPU if one is named, otherwise the CPU and the number of cores."""
    gpu = environment.get("gpu")
    if gpu:
        return str(gpu)
    cpus = environment.get("cpus", "?")
    return f"{environment.get('cpu', 'unknown CPU')}, {cpus} CPU{'' if cpus == 1 else 's'}"


def _report(folder: Path) -> Report:
    path = folder / "report.json"
    if not folder.is_dir():
        why = "it is a file" if folder.exists() else "there is no such folder"
        raise InputError(f"cannot compare {folder}", why, "give the folder of a finished run")
    if not path.is_file():
        if (folder / "recipe.yaml").is_file():
            raise InputError(f"{folder} is not finished", "it has no report.json", "run its recipe to the end")
        raise InputError(f"{folder} is not a run folder", "it has no report.json", "give the folder of a finished run")
    try:
        return Report.model_validate_json(read_text(path, LARGEST))
    except (OSError, ValueError, RecursionError) as error:
        first = " ".join(str(error).split())[:200]
        raise InputError(f"cannot read {path}", first, "run its recipe again") from None


def _labels(names: Sequence[str], folders: Sequence[Path]) -> list[str]:
    """Labels of runs: the recipe's name; if it is not unique, with the folder's name; if still not unique, the path."""
    for labels in (
        list(names),
        [
            name if names.count(name) == 1 else f"{name} ({path.name})"
            for name, path in zip(names, folders, strict=True)
        ],
    ):
        if len(set(labels)) == len(labels):
            return labels
    return [str(path) for path in folders]


def _recipe(path: Path) -> dict[str, str]:
    try:
        value = parse_yaml(read_text(path, MAX_TEXT))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return dict(_fields(value)) if isinstance(value, dict) else {}


def _evaluation(path: Path) -> str:
    try:
        return str(read_json(path)["inputs"]["evaluation"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return ""


def _fields(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    if isinstance(value, dict) and value:
        return [one for key, item in value.items() for one in _fields(item, f"{prefix}.{key}" if prefix else str(key))]
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        return [one for index, item in enumerate(value) for one in _fields(item, f"{prefix}.{index}")]
    return [(prefix, yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("...\n").strip())]
