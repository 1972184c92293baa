"""Compare many runs on one page: what each kept, lost and gained, and which runs no other run beats.

Accuracy is compared only within one task, metric and set of evaluation rows, and latency only within one machine,
target, batch, sequence and mode: a front never mixes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from markupsafe import Markup

from optin_export.recipe.tasks import is_lower_better
from optin_export.report.gather import Run, machine_of, read_runs
from optin_export.report.tradeoff import Panel, Point, interval, tradeoff
from optin_export.workdir.files import write_text


@dataclass(frozen=True)
class Front:
    """Points of comparable runs; `front` marks those that no other run beats in both respects."""

    machine: str
    target: str
    batch: int
    sequence: int | None
    mode: str
    points: tuple[Point, ...]

    @property
    def title(self) -> str:
        tokens = f", {self.sequence} tokens" if self.sequence else ""
        return f"{self.target}, batch {self.batch}{tokens}"


@dataclass(frozen=True)
class Group:
    """Runs of one task, metric and evaluation data.

    unmeasured: run -> why it is on no front. differences: field of the recipe -> value of each run.
    kept: (block, kind) -> (kept, count) of each run, None if it has no such units.
    """

    task: str
    metric: str | None
    rows: int
    runs: tuple[Run, ...]
    fronts: tuple[Front, ...]
    unmeasured: dict[str, str]
    differences: dict[str, tuple[str, ...]]
    kept: dict[tuple[int, str], tuple[tuple[int, int] | None, ...]]

    @property
    def title(self) -> str:
        return f"{self.task}, {self.metric} of {self.rows} rows" if self.metric else f"{self.task}, no accuracy"


@dataclass(frozen=True)
class Comparison:
    groups: tuple[Group, ...]
    warnings: tuple[str, ...]
    page: Path

    def to_json(self) -> dict[str, Any]:
        return {"page": str(self.page), "warnings": self.warnings, "groups": [_to_json(one) for one in self.groups]}


def compare(folders: Sequence[Path], out: Path) -> Comparison:
    """Write the page of several finished runs to `out` atomically and return its content.

    Raises InputError for fewer than two folders, one given twice, or one that holds no finished, readable run, and
    where `out` is a folder; EnvironmentLacks where `out` cannot be written.
    """
    runs = read_runs(folders)
    kinds = list(dict.fromkeys(run.kind for run in runs))
    groups = tuple(group_of([run for run in runs if run.kind == kind]) for kind in kinds)
    comparison = Comparison(groups, tuple(warnings_of(groups)), out)
    write_text(out, render(comparison))
    return comparison


def group_of(runs: Sequence[Run]) -> Group:
    task, metric, rows, _ = runs[0].kind
    fronts = fronts_of(runs, metric)
    shown = {point.label for front in fronts for point in front.points}
    return Group(
        task,
        metric,
        rows,
        tuple(runs),
        tuple(fronts),
        {run.label: _why_unmeasured(run) for run in runs if run.label not in shown},
        differences(runs),
        kept(runs),
    )


#: Label of the unpruned model's point.
UNPRUNED = "unpruned"


def fronts_of(runs: Sequence[Run], metric: str | None) -> list[Front]:
    """The points of runs that were measured alike, and that of their unpruned model: the median of what each of these
    runs measured of it, for every accuracy that it has in them."""
    if metric is None:
        return []
    found: dict[tuple[str, str, int, int | None, str], list[Point]] = {}
    whole: dict[tuple[str, str, int, int | None, str], dict[float, list[float]]] = {}
    for run in runs:
        for machine, accuracy, one in run.timed():
            if accuracy is not None and accuracy.metric == metric:
                key = (machine, one.target, one.batch, one.sequence, one.mode)
                low, high = interval(accuracy)
                found.setdefault(key, []).append(Point(run.label, one.pruned_ms.p50, accuracy.pruned, low, high))
                unpruned = one.engines_ms.get("base", one.base_ms)
                whole.setdefault(key, {}).setdefault(accuracy.base, []).append(unpruned.p50)
    for key, times in whole.items():
        found[key] += [Point(UNPRUNED, median(ms), value, model="base") for value, ms in times.items()]
    lower = is_lower_better(metric)
    return [Front(*key, mark(points, lower)) for key, points in found.items()]


def mark(points: Sequence[Point], lower_is_better: bool) -> tuple[Point, ...]:
    """Which points no other beats: none is as fast and as accurate, and better in one of the two."""
    sign = -1 if lower_is_better else 1

    def beats(other: Point, point: Point) -> bool:
        gain = sign * (other.accuracy - point.accuracy)
        return other.cost <= point.cost and gain >= 0 and (other.cost < point.cost or gain > 0)

    return tuple(replace(point, front=not any(beats(other, point) for other in points)) for point in points)


def differences(runs: Sequence[Run]) -> dict[str, tuple[str, ...]]:
    fields = dict.fromkeys(field for run in runs for field in run.recipe)
    values = {field: tuple(run.recipe.get(field, "not given") for run in runs) for field in fields}
    return {field: each for field, each in values.items() if len(set(each)) > 1 and field != "name"}


def kept(runs: Sequence[Run]) -> dict[tuple[int, str], tuple[tuple[int, int] | None, ...]]:
    found = [{(g.block, g.kind): (g.kept, g.count) for g in run.report.pruning.groups} for run in runs]
    return {key: tuple(one.get(key) for one in found) for key in sorted({key for one in found for key in one})}


def warnings_of(groups: Sequence[Group]) -> list[str]:
    remarks = []
    if len(groups) > 1:
        kinds = ", ".join(one.title for one in groups)
        remarks.append(
            f"The runs are of {len(groups)} tasks, metrics or evaluation data, which are not compared: {kinds}."
        )
    for group in groups:
        name = group.title
        reports = [run.report for run in group.runs]
        if len({report.model.get("source") for report in reports}) > 1:
            remarks.append(f"{name}: the runs are of different models.")
        if len({one.accuracy.base for one in reports if one.accuracy}) > 1:
            remarks.append(f"{name}: the unpruned models differ in accuracy: other weights or another engine.")
        if len({machine_of(report.environment) for report in reports}) > 1:
            remarks.append(f"{name}: the runs are from different machines; each has its own front.")
        remarks += [f"{run.label}: its recipe.yaml cannot be read." for run in group.runs if not run.recipe]
    return remarks


def render(comparison: Comparison) -> str:
    from optin_export.report.html import environment

    plots = []
    for index, group in enumerate(comparison.groups):
        machines = dict.fromkeys(front.machine for front in group.fronts)
        plots.append(
            [(machine, Markup(_plot(group, machine, f"front{index}-{at}"))) for at, machine in enumerate(machines)]
        )
    template = environment().get_template("compare.html.j2")
    return template.render(comparison=comparison, plots=plots, machine_of=machine_of)


def _plot(group: Group, machine: str, name: str) -> str:
    panels = [Panel(f.title, "latency, p50 (ms)", f.points) for f in group.fronts if f.machine == machine]
    return tradeoff(panels, group.metric or "", name)


def _why_unmeasured(run: Run) -> str:
    if not run.timed():
        reasons = [engine.unmeasured for engine in run.report.engines if engine.unmeasured]
        return f"no latency was measured: {reasons[0]}" if reasons else "no latency was measured"
    return "no accuracy was evaluated"


def _to_json(group: Group) -> dict[str, Any]:
    return {
        "task": group.task,
        "metric": group.metric,
        "rows": group.rows,
        "runs": [
            {
                "label": run.label,
                "folder": str(run.folder),
                "machine": machine_of(run.report.environment),
                **run.report.model_dump(mode="json", include={"name", "precision", "macs", "params", "accuracy"}),
                "passed": run.report.verdict.passed,
                "summary": run.report.verdict.summary,
                "quick": run.report.quick,
                "warnings": list(run.report.warnings),
                "latency": [
                    {"machine": machine, **one.model_dump(mode="json", include=_SHOWN)}
                    for machine, _, one in run.timed()
                ],
            }
            for run in group.runs
        ],
        "fronts": [asdict(front) for front in group.fronts],
        "unmeasured": group.unmeasured,
        "differences": {
            field: dict(zip((run.label for run in group.runs), values, strict=True))
            for field, values in group.differences.items()
        },
    }


_SHOWN = {"target", "batch", "sequence", "mode", "precision", "base_ms", "pruned_ms", "speedup", "noise_floor"}
