"""Render docs/results.md, its plots in docs/figures/ and the README's numbers from docs/measurements/ alone.

    python tools/render_results.py

docs/measurements/accuracy/<case>.json comes from tools/benchmark_accuracy.py (torch models, every scorer and repair),
docs/measurements/<recipe>.json from tools/benchmark_recipes.py (engines, with latency), docs/measurements/studies/ from
the studies that `render_studies` names, docs/measurements/gpu/ from tools/gpu_acceptance.py. What is not there is left
out.
"""

from __future__ import annotations

import json
import math
import statistics
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import render_gpu
import render_precision
import render_studies
from plots import markdown_table, svg

from optin_export.recipe import load_recipe
from optin_export.scoring import CHANNELS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
MEASUREMENTS = ROOT / "docs" / "measurements"
PAGE, FIGURES, README = ROOT / "docs" / "results.md", ROOT / "docs" / "figures", ROOT / "README.md"

CASES = {
    "minilm-stsb": "MiniLM-L6 on STS-B",
    "minilm-sst2": "MiniLM-L6 on SST-2",
    "resnet56-cifar10": "ResNet-56 on CIFAR-10",
    "resnet56-cifar10-5k": "ResNet-56 on CIFAR-10, 5,000 calibration images",
    "resnet56-cifar10-curves": "ResNet-56 on CIFAR-10, 5,000 calibration images, 1,024 of them for the loss curves",
    "resnet20-cifar10": "ResNet-20 on CIFAR-10",
    "vit-digits": "ViT on handwritten digits",
    "vit-cifar10": "ViT on CIFAR-10",
    "segformer-camvid": "SegFormer on CamVid",
    "mask2former-camvid": "Mask2Former on CamVid",
}
CASE_OF_RECIPE = {
    "minilm_sts": "minilm-stsb",
    "minilm_sst2": "minilm-sst2",
    "cifar_resnet56": "resnet56-cifar10-5k",
    "quickstart": "vit-digits",
    "cifar_vit": "vit-cifar10",
    "camvid_segformer": "segformer-camvid",
    "camvid_mask2former": "mask2former-camvid",
}
OWN, REPAIRED, REFINED = "optin", "least-squares", "gauss-newton"
BUDGETS = (0.7, 0.6, 0.5, 0.4, 0.3)
#: Points that OWN with REPAIRED may lose at most, by case and share of MACs kept.
TARGETS = {
    "minilm-stsb": {0.6: 0.0, 0.5: 0.2, 0.4: 0.3, 0.3: 0.8},
    "minilm-sst2": {0.6: 0.3, 0.5: 0.7, 0.4: 1.2, 0.3: 2.0},
    "resnet56-cifar10": {0.6: 0.5, 0.5: 1.0, 0.4: 2.5, 0.3: 6.0},
    "resnet56-cifar10-5k": {0.6: 0.5, 0.5: 1.0, 0.4: 2.5, 0.3: 6.0},
    "vit-cifar10": {0.6: 0.5, 0.5: 1.0, 0.4: 2.0, 0.3: 4.0},
}
REPAIRS = {
    "gauss-newton": "least-squares repair and Gauss-Newton on the output",
    "least-squares": "least-squares repair",
    "rescale": "rescaling",
    "none": "no repair",
}
LINES = {"gauss-newton": "-.", "least-squares": "-", "rescale": ":", "none": "--"}
#: Colour (Okabe-Ito's) and marker of each scorer, in the order of tables and legends.
SCORERS = {
    "optin": ("#0072b2", "o"),
    "optin-exact": ("#56b4e9", "P"),
    "optin-reference": ("#000000", "D"),
    "fisher": ("#e69f00", "^"),
    "activation": ("#009e73", "s"),
    "magnitude": ("#d55e00", "v"),
    "random": ("#cc79a7", "X"),
    "obs": ("#8c564b", "*"),
}
EPSILON = 1e-9  # sums of decimals are not exact


@dataclass(frozen=True)
class Cell:
    """What was measured at one budget: one value per seed."""

    drops: tuple[float, ...]
    accuracies: tuple[float, ...]
    macs: float

    @property
    def drop(self) -> float:
        return statistics.fmean(self.drops)

    @property
    def accuracy(self) -> float:
        return statistics.fmean(self.accuracies)

    @property
    def spread(self) -> float:
        """Standard deviation over seeds; 0 if there is one."""
        return statistics.stdev(self.drops) if len(self.drops) > 1 else 0.0

    def __str__(self) -> str:
        return f"{self.drop:z.2f}" + (f" ± {self.spread:.2f}" if len(self.drops) > 1 else "")


class Case:
    """One file of docs/measurements/accuracy: {(scorer, repair): {budget: Cell}}, in the order of the tables."""

    def __init__(self, document: dict[str, Any]) -> None:
        self.document, self.name = document, str(document["case"])
        self.title = CASES.get(self.name, self.name)
        rows = document["rows"]
        self.seeds = sorted({row["seed"] for row in rows})
        self.base = statistics.fmean({row["seed"]: row["base"] for row in rows}.values()) if rows else math.nan
        keys = {(row["scorer"], row["repair"]) for row in rows}
        self.lines: dict[tuple[str, str], dict[float, Cell]] = {}
        for key in sorted(keys, key=lambda key: (*_place(SCORERS, key[0]), *_place(REPAIRS, key[1]))):
            chosen = [row for row in rows if (row["scorer"], row["repair"]) == key]
            self.lines[key] = {
                budget: _cell([row for row in chosen if row["budget"] == budget])
                for budget in sorted({row["budget"] for row in chosen}, reverse=True)
            }
        self.budgets = sorted({*BUDGETS, *(row["budget"] for row in rows)}, reverse=True)

    def get(self, scorer: str, repair: str, budget: float) -> Cell | None:
        return self.lines.get((scorer, repair), {}).get(budget)


def _cell(rows: list[dict[str, Any]]) -> Cell:
    drops, accuracies = (tuple(row[name] for row in rows) for name in ("drop", "accuracy"))
    return Cell(drops, accuracies, statistics.fmean(row["macs"] for row in rows))


def _place(order: Iterable[str], name: str) -> tuple[int, str]:
    known = list(order)
    return (known.index(name) if name in known else len(known)), name


def cases(measurements: Path) -> list[Case]:
    """The cases that were measured, in the order of the page."""
    paths = sorted((measurements / "accuracy").glob("*.json"), key=lambda path: _place(CASES, path.stem))
    found = [Case(json.loads(path.read_text(encoding="utf-8"))) for path in paths]
    return [case for case in found if case.lines]


def recipes(measurements: Path) -> dict[str, dict[str, Any]]:
    """{name: measurements} of the recipes that were run; other files in the folder are not theirs."""
    contents = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(measurements.glob("*.json"))}
    return {name: content for name, content in contents.items() if isinstance(content, dict) and content.get("results")}


# --------------------------------------------------------------------------------------------------------------- pages


def page(measurements: Path = MEASUREMENTS) -> str:
    """docs/results.md, from the stored measurements alone."""
    lines = [
        "# Results",
        "",
        "Written by `tools/render_results.py` from the files in `docs/measurements/`; nothing is typed by hand. No",
        "retraining but in the section that says so.",
    ]
    measured = cases(measurements)
    if measured:
        lines += [
            "",
            "## Accuracy without retraining",
            "",
            "Points lost against the unpruned model on held-out rows (negative: gained), as torch models, at a share",
            "of MACs kept: the mean over seeds ± their standard deviation, without it where only one seed was",
            "measured; `-` was not measured. Seeds draw the calibration rows and all that is random in scores and",
            "repair; the spread does not hold the uncertainty of the held-out rows. The smallest mean of several in a",
            "column is bold.",
            *targets(measured),
        ]
    for case in measured:
        lines += [
            "",
            f"### {case.title} (`{case.name}`)",
            "",
            _facts(case),
            "",
            *accuracy_table(case),
            "",
            *losses(case),
        ]
        lines += ["", f"![{_macs_alt(case)}](figures/{case.name}-macs.svg)"]
    engines = recipes(measurements)
    if engines:
        lines += [
            "",
            "## Engines",
            "",
            "Drop: points lost against the unpruned engine (negative: gained), with a 95 % bootstrap interval over the",
            "evaluation rows. Speedup: ratio of interleaved median latencies with its 95 % interval; times the share",
            "of MACs kept, it would be 1 if time went with MACs.",
        ]
    for name, content in engines.items():
        if is_precision(content):
            continue
        lines += ["", f"### `recipes/{name}.yaml`", "", *table(content)]
        if name in CASE_OF_RECIPE and _batch_one(content):
            case_name = CASE_OF_RECIPE[name]
            lines += ["", f"![{_latency_alt(case_name, content)}](figures/{case_name}-latency.svg)"]
    lines += precisions(engines)
    lines += render_studies.sections(measurements / "studies")
    lines += render_gpu.sections(measurements / "gpu")
    return "\n".join(lines) + "\n"


def is_precision(content: dict[str, Any]) -> bool:
    """Whether a recipe was run in another precision than fp32."""
    return content["results"][0].get("precision", "fp32") != "fp32"


def precisions(engines: dict[str, dict[str, Any]]) -> list[str]:
    """The section of recipes that were run in another precision."""
    chosen = [content for content in engines.values() if is_precision(content)]
    if not chosen:
        return []
    lines = [
        "",
        "## Pruning and another precision together",
        "",
        "All four engines of a table were timed interleaved, in the same blocks of one process. Speedups: ratio of",
        "median latencies with its 95 % interval.",
    ]
    for content in chosen:
        first = content["results"][0]
        title = f"### `recipes/{content['recipe']}.yaml` in {first['precision']}{render_precision.form(first)}"
        lines += ["", title, "", *render_precision.table(content), "", _machine(content["results"])]
    return lines


def readme(text: str, measurements: Path = MEASUREMENTS) -> str:
    """The README with what stands between `<!-- measured: NAME -->` and `<!-- end -->` made from the measurements."""
    stored = recipes(measurements)
    budget = load_recipe(ROOT / "recipes" / "quickstart.yaml").prune.budget.fraction
    verdict = next(one["verdict"]["summary"] for one in stored["quickstart"]["results"] if one["budget"] == budget)
    parts = {"quickstart": f"```text\n{verdict}\n```", "minilm_sts": "\n".join(table(stored["minilm_sts"]))}
    for name, content in parts.items():
        start, end = f"<!-- measured: {name} -->\n", "\n<!-- end -->"
        before, _, rest = text.partition(start)
        text = before + start + content + end + rest.partition(end)[2]
    return text


def _facts(case: Case) -> str:
    """What was measured, on what: one line."""
    about = case.document
    machine = about["machine"]
    cells = [len(cell.drops) for line in case.lines.values() for cell in line.values()]
    fewer = sum(count < len(case.seeds) for count in cells)
    return (
        f"{about['metric'].capitalize()} in points on {about['held_out_rows']} held-out rows, "
        f"unpruned {case.base:.2f}; "
        f"{about['calibration_rows']} calibration rows, {about['scoring_rows']} of them for the scores, "
        f"{about['curve_rows']} for the loss curves; "
        f"{'seeds' if len(case.seeds) > 1 else 'seed'} {', '.join(map(str, case.seeds))}"
        + (f" (fewer in {fewer} of {len(cells)} cells)" if fewer else "")
        + f"; {machine['cpu']}, {machine['threads']} {'thread' if machine['threads'] == 1 else 'threads'}, "
        f"torch {about['torch']}, {about['written']}."
    )


def accuracy_table(case: Case) -> list[str]:
    """Scorer x repair against budgets; the best of several means is bold (ties: all that are printed alike)."""
    means = {
        budget: [round(line[budget].drop, 2) for line in case.lines.values() if budget in line]
        for budget in case.budgets
    }
    rows = []
    for (scorer, repair), line in case.lines.items():
        cells = []
        for budget in case.budgets:
            cell = line.get(budget)
            best = cell is not None and len(means[budget]) > 1 and round(cell.drop, 2) == min(means[budget])
            cells.append("-" if cell is None else f"**{cell}**" if best else str(cell))
        rows.append([f"`{scorer}`", repair, *cells])
    return markdown_table(["scorer", "repair", *(f"{budget:g}" for budget in case.budgets)], rows)


def losses(case: Case) -> list[str]:
    """One sentence for each time another scorer beats OWN with the same repair by more than both deviations."""
    compared, lines, default = 0, [], default_of(case)
    for (scorer, repair), line in case.lines.items():
        if scorer == OWN or repair == "none":
            continue
        for budget, cell in line.items():
            own = case.get(OWN, repair, budget)
            if own is None:
                continue
            compared += 1
            if own.drop - cell.drop > max(own.spread, cell.spread) + EPSILON:
                lines.append(
                    f"- At {budget:g} of the MACs, `{scorer}` beats `{OWN}` with {REPAIRS.get(repair, repair)}: "
                    f"it loses {cell} points, `{OWN}` {own} ({own.drop - cell.drop:.2f} more)."
                )
    if not any(scorer == OWN for scorer, _ in case.lines):
        return [f"`{OWN}` itself has not been measured here."]
    if not compared:
        return [f"No other scorer has been measured with the same repair as `{OWN}` yet."]
    rule = "by more than both standard deviations (0 where one seed was measured)"
    if not lines:
        return [f"In none of {compared} comparisons with the same repair does another scorer beat `{OWN}` {rule}."]
    return [
        f"Another scorer beats `{OWN}` {rule} in {len(lines)} of {compared} comparisons with the same repair:",
        "",
        *lines,
        *(["", f"`prune.score: auto`, the default, takes `{default}` for such models."] if default != OWN else []),
    ]


def default_of(case: Case) -> str:
    """What `prune.score: auto` takes for the case's model; both ResNets have channels only."""
    return CHANNELS if case.name.startswith("resnet") and (CHANNELS, REPAIRED) in case.lines else OWN


def repair_of(case: Case) -> str:
    """What `prune.compensate: true` and `gauss_newton: auto` do for the case's model, where that was measured."""
    convolutional = case.name.startswith("resnet")
    return REFINED if convolutional and (default_of(case), REFINED) in case.lines else REPAIRED


def targets(measured: list[Case]) -> list[str]:
    """The table of targets, for those cases that were measured."""
    rows, verdicts = [], []
    budgets = sorted({budget for of_case in TARGETS.values() for budget in of_case}, reverse=True)
    for case in measured:
        if case.name not in TARGETS:
            continue
        cells, default, repair = [], default_of(case), repair_of(case)
        for budget in budgets:
            target, cell = TARGETS[case.name].get(budget), case.get(default, repair, budget)
            if target is None:
                cells.append("-")
            elif cell is None:
                cells.append(f"- (target {target:.1f}: not measured)")
            else:
                missed = cell.drop - target
                verdicts.append(missed <= EPSILON)
                by = f"{missed:.2f}" if missed >= 0.005 else "less than 0.01"
                verdict = "met" if verdicts[-1] else f"missed by {by}"
                cells.append(f"{cell.drop:z.2f} (target {target:.1f}: {verdict})")
        names = [
            f"`{case.name}`",
            *([f"`{default}`"] if default != OWN else []),
            *([repair] if repair != REPAIRED else []),
        ]
        rows.append([", ".join(names), *cells])
    if not rows:
        return []
    return [
        "",
        "### Targets",
        "",
        f"Mean points lost by what `prune.score: auto` takes (`{OWN}` where no other is named) with "
        f"{REPAIRS[REPAIRED]}, and Gauss-Newton where that is named, against the most that it should lose; "
        f"met: {sum(verdicts)} of {len(verdicts)} measured.",
        "",
        *markdown_table(["case", *(f"{budget:g}" for budget in budgets)], rows),
    ]


def table(measured: dict[str, Any]) -> list[str]:
    """One recipe's measurements as a Markdown table, with the machine named below it."""
    head = "MACs kept|parameters kept|metric|unpruned|pruned|drop|batch|unpruned p50|pruned p50|speedup"
    columns = [*head.split("|"), "speedup x MACs kept"]
    return [
        *markdown_table(columns, [row for result in measured["results"] for row in _rows(result)]),
        "",
        _machine(measured["results"]),
    ]


def _machine(results: list[dict[str, Any]]) -> str:
    """In a line: the first one's, and the most that other work took of any one's CPU time, where that was counted."""
    machine = results[0]["environment"]
    packages, cpus = machine["packages"], machine["cpus"]
    seen = [one.get("neighbours") for result in results for one in result["latency"]]
    others = [one["others"] + one["stolen"] for one in seen if one]
    told = f" Other work took at most {max(others):.1%} of all CPU time meanwhile." if len(others) == len(seen) else ""
    return (
        f"Machine: {machine['cpu']}, {cpus} core{'s' * (cpus != 1)}, {machine['memory_gib']} GiB; "
        f"onnxruntime {packages.get('onnxruntime')}, torch {packages['torch']}, Python {machine['python']}.{told}"
    )


def _rows(result: dict[str, Any]) -> list[list[str]]:
    accuracy, ratio = result["accuracy"], result["macs"]["ratio"]
    head = [
        f"{ratio:.1%}",
        f"{result['params']['ratio']:.1%}",
        accuracy["metric"],
        f"{accuracy['base']:.2f}",
        f"{accuracy['pruned']:.2f}",
        f"{accuracy['drop']:.2f} ({accuracy['drop_low']:.2f} to {accuracy['drop_high']:.2f})",
    ]
    rows = []
    for one in result["latency"]:
        speedup = one["speedup"]
        rows.append(
            [
                *head,
                f"{one['batch']} x {one['sequence']}" if one["sequence"] else f"{one['batch']}",
                f"{one['base_ms']['p50']:.3g} ms",
                f"{one['pruned_ms']['p50']:.3g} ms",
                f"{speedup['median']:.2f}x ({speedup['ci_low']:.2f} to {speedup['ci_high']:.2f})",
                f"{speedup['median'] * ratio:.2f}",
            ]
        )
    return rows


def _macs_alt(case: Case) -> str:
    """The plot's main numbers: OWN with its repair (or what there is), and the best of the others beside it."""
    key = (OWN, REPAIRED) if (OWN, REPAIRED) in case.lines else next(iter(case.lines))
    parts = []
    for budget, cell in case.lines[key].items():
        others = {
            scorer: line[budget].accuracy
            for (scorer, repair), line in case.lines.items()
            if repair == key[1] and scorer != key[0] and budget in line
        }
        best = max(others, key=others.__getitem__, default=None)
        beside = f" (best other scorer: {best} {others[best]:.2f})" if best is not None else ""
        parts.append(f"{cell.accuracy:.2f} at {cell.macs:.0%}{beside}")
    return (
        f"{case.title}: {case.document['metric']} in points against MACs kept. Unpruned {case.base:.2f}; "
        f"{key[0]} with {REPAIRS.get(key[1], key[1])} {', '.join(parts)}"
    )


def _latency_alt(case_name: str, content: dict[str, Any]) -> str:
    parts = []
    for target, points in _batch_one(content).items():
        pruned = [f"{one.accuracy:.2f} at {one.ms:.3g} ms with {one.ratio:.0%} of the MACs" for one in points]
        base = f"unpruned {points[0].base:.2f} at {_base_ms(points):.3g} ms"
        parts.append(f"{target}: {base}; {', '.join(pruned)}")
    metric = content["results"][0]["accuracy"]["metric"]
    return f"{CASES[case_name]}: {metric} in points against median latency at batch 1. {'. '.join(parts)}"


# ------------------------------------------------------------------------------------------------------------- figures


@dataclass(frozen=True)
class Point:
    """One engine at batch 1: accuracy in points with its interval, median latency in milliseconds."""

    ratio: float
    accuracy: float
    low: float
    high: float
    ms: float
    base: float
    base_ms: float


def _batch_one(content: dict[str, Any]) -> dict[str, list[Point]]:
    """{target: points from the largest model to the smallest}."""
    points: dict[str, list[Point]] = {}
    for result in sorted(content["results"], key=lambda result: -result["macs"]["ratio"]):
        accuracy = result.get("accuracy")
        for one in (result.get("latency") or []) if accuracy else []:
            if one["batch"] == 1:
                name = one["target"] + (f", {one['sequence']} tokens" if one["sequence"] else "")
                low, high = (accuracy["base"] - accuracy[end] for end in ("drop_high", "drop_low"))
                values = result["macs"]["ratio"], accuracy["pruned"], low, high, one["pruned_ms"]["p50"]
                points.setdefault(name, []).append(Point(*values, accuracy["base"], one["base_ms"]["p50"]))
    return points


def _base_ms(points: list[Point]) -> float:
    return statistics.median(point.base_ms for point in points)


def figures(measurements: Path = MEASUREMENTS) -> dict[str, str]:
    """{file name: SVG} of every plot on the page."""
    plots = {f"{case.name}-macs.svg": _macs_plot(case) for case in cases(measurements)}
    plots |= render_studies.figures(measurements / "studies")
    for name, content in recipes(measurements).items():
        if name in CASE_OF_RECIPE and _batch_one(content):
            plots[f"{CASE_OF_RECIPE[name]}-latency.svg"] = _latency_plot(CASE_OF_RECIPE[name], content)
    return plots


def _macs_plot(case: Case) -> str:
    """Accuracy against MACs kept; where some lines fall far below, a second panel enlarges what stays near the top."""
    from matplotlib.lines import Line2D

    cells = {key: list(line.values()) for key, line in case.lines.items()}
    lowest = min(cell.accuracy - cell.spread for line in cells.values() for cell in line)
    highest = max(case.base, *(cell.accuracy + cell.spread for line in cells.values() for cell in line))
    near = cells.get((OWN, REPAIRED)) or max(cells.values(), key=lambda line: min(cell.accuracy for cell in line))
    span = max(1.4 * (case.base - min(cell.accuracy - cell.spread for cell in near)), 1.0)
    enlarged = case.base - lowest > 2.5 * span
    styles = {scorer: SCORERS.get(scorer, ("#666666", "*")) for scorer, _ in cells}
    repairs = [repair for repair in [*REPAIRS, *{repair for _, repair in cells}] if any(repair == r for _, r in cells)]

    def panel(axes: Axes, low: float, high: float) -> None:
        axes.axhline(case.base, color="#444444", linewidth=1)
        for (scorer, repair), line in reversed(cells.items()):
            colour, marker = styles[scorer]
            axes.errorbar(
                [100 * cell.macs for cell in line],
                [cell.accuracy for cell in line],
                yerr=[cell.spread for cell in line] if any(cell.spread for cell in line) else None,
                color=colour,
                marker=marker,
                linestyle=LINES.get(repair, "-."),
                markerfacecolor="white" if repair == "none" else colour,
                markersize=5,
                linewidth=2 if scorer == OWN else 1.3,
                capsize=3,
            )
        margin = max(0.05 * (high - low), 0.5)
        axes.set(xlabel="MACs kept (% of the unpruned model)", ylim=(low - margin, high + margin))
        kept = [100 * cell.macs for line in cells.values() for cell in line]
        axes.set_xlim(min(kept) - 3, max(kept) + 3)
        axes.grid(True)

    def draw(figure: Figure) -> None:
        panels = list(figure.subplots(1, 1 + enlarged, squeeze=False)[0])
        panel(panels[0], lowest, highest)
        panels[0].set_ylabel(f"{case.document['metric']} (points)")
        if enlarged:
            panel(panels[1], case.base - span, max(highest, case.base + 0.1 * span))
            panels[0].set_title("all")
            panels[1].set_title("enlarged")
        handles = [Line2D([], [], color=styles[name][0], marker=styles[name][1], label=name) for name in styles]
        for repair in dict.fromkeys(repairs):
            face = "white" if repair == "none" else "#444444"
            look = {"marker": "o", "markerfacecolor": face, "linestyle": LINES.get(repair, "-.")}
            handles.append(Line2D([], [], color="#444444", label=REPAIRS.get(repair, repair), **look))
        handles.append(Line2D([], [], color="#444444", linewidth=1, label=f"unpruned, {case.base:.2f}"))
        figure.legend(handles=handles, loc="outside right center", handlelength=3)
        seeds = f"mean and standard deviation of {len(case.seeds)} seeds" if len(case.seeds) > 1 else "one seed"
        figure.suptitle(textwrap.fill(f"{case.title}, no retraining ({seeds})", 90 if enlarged else 72))

    return svg(f"{case.name}-macs", (9.6 if enlarged else 7.2, 3.6), draw)


def _latency_plot(case_name: str, content: dict[str, Any]) -> str:
    """Accuracy against median latency of one request: the unpruned engine as its own point, one line per target."""
    targets = _batch_one(content)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        points = [point for chosen in targets.values() for point in chosen]
        axes.axhline(points[0].base, color="#444444", linewidth=1)
        for (target, chosen), (colour, marker) in zip(targets.items(), _cycle(len(targets)), strict=True):
            # An interval of resampled metrics need not hold the metric itself.
            error = [
                [max(one.accuracy - one.low, 0) for one in chosen],
                [max(one.high - one.accuracy, 0) for one in chosen],
            ]
            places = [one.ms for one in chosen], [one.accuracy for one in chosen]
            look: dict[str, Any] = {"color": colour, "capsize": 3, "markersize": 6}
            axes.errorbar(*places, yerr=error, fmt=f"{marker}-", label=f"pruned, {target}", **look)
            times, middle = [one.base_ms for one in chosen], _base_ms(chosen)
            spread = [[middle - min(times)], [max(times) - middle]]
            label = f"unpruned, {target}"
            axes.errorbar(
                [middle], [chosen[0].base], xerr=spread, fmt=marker, markerfacecolor="white", label=label, **look
            )
            for x, y, text in [
                *((o.ms, o.accuracy, f"{o.ratio:.0%}") for o in chosen),
                (middle, chosen[0].base, "100%"),
            ]:
                axes.annotate(text, (x, y), (6, -12), textcoords="offset points")
        low, high = min(min(one.low, one.accuracy) for one in points), max(max(one.high, one.base) for one in points)
        margin = max(0.08 * (high - low), 0.5)
        axes.set(xlabel="median latency of one request (ms)", ylabel=f"{metric} (points)")
        axes.set_xlim(0, 1.1 * max(max(one.ms, one.base_ms) for one in points))
        axes.set_ylim(low - margin, high + margin)
        axes.grid(True)
        figure.legend(loc="outside lower center", ncols=2)
        title = f"{CASES[case_name]}, no retraining (labels: MACs kept; bars: 95 % interval of the drop)"
        figure.suptitle(textwrap.fill(title, 76))

    metric = content["results"][0]["accuracy"]["metric"]
    return svg(f"{case_name}-latency", (7.2, 3.8), draw)


def _cycle(count: int) -> list[tuple[str, str]]:
    looks = list(SCORERS.values())
    return [looks[place % len(looks)] for place in range(count)]


def write() -> None:
    """Write the page, its plots and the measured parts of the README."""
    PAGE.write_text(page(), encoding="utf-8")
    README.write_text(readme(README.read_text(encoding="utf-8")), encoding="utf-8")
    plots = figures()
    FIGURES.mkdir(parents=True, exist_ok=True)
    for name, drawn in plots.items():
        (FIGURES / name).write_text(drawn, encoding="utf-8")
    print(f"wrote {PAGE}, {len(plots)} plots in {FIGURES} and the measured parts of {README}")


if __name__ == "__main__":
    write()
