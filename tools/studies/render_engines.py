"""The parts of docs/results.md on engines: the summary and the tables, from docs/measurements/<recipe>.json."""

from __future__ import annotations

import json
import statistics
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import marks
import render_precision
from accuracy_tables import CASES, SCORERS, Case, Table
from plots import faster, markdown_table, svg
from render_accuracy import training_texts

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CASE_OF_RECIPE = {
    "minilm_sts": "minilm-stsb",
    "minilm_sst2": "minilm-sst2",
    "cifar_resnet56": "resnet56-cifar10-5k",
    "quickstart": "vit-digits",
    "cifar_vit": "vit-cifar10",
    "camvid_segformer": "segformer-camvid",
    "camvid_mask2former": "mask2former-camvid",
}
HEAD = """\
## Engines

Drop: points lost against the unpruned engine (negative: gained), with a 95 % bootstrap interval over the
evaluation rows. These are all held-out rows of the case, on which defaults were chosen, too
([which rows](#accuracy-without-retraining)). Speedup: ratio of interleaved median latencies with its 95 % interval.
The last column would be 1 if time were proportional to MACs.""".splitlines()

#: What the README and the summary show: all but the toy model of the quickstart.
SHOWN = [name for name in CASE_OF_RECIPE if name != "quickstart"]
SUMMARY = """\
Points lost: metric of the unpruned engine minus that of the pruned one, with a 95 % bootstrap interval over all
held-out rows (negative: gained). Speedup: unpruned over pruned median latency, timed in turns, fp32, onnxruntime, one
CPU thread; at the batch size with the smallest one, with its 95 % interval. Minutes: scoring, loss curves and repair on
one thread (median over seeds; the machine was not always quiet), plus the measurement, without export. Further budgets
of the same model reuse scores and loss curves.""".splitlines()
CAVEATS = """\
Read with care: most SST-2 rows are [parts of training texts](#minilm-l6-on-sst-2-minilm-sst2), the SegFormer checkpoint
is undertrained, and defaults were chosen on these rows ([which rows](#accuracy-without-retraining)).""".splitlines()


def recipes(measurements: Path) -> dict[str, dict[str, Any]]:
    """{name: measurements} of the recipes that were run; other files in the folder are not theirs."""
    contents = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(measurements.glob("*.json"))}
    return {name: content for name, content in contents.items() if isinstance(content, dict) and content.get("results")}


def summary(engines: dict[str, dict[str, Any]], measured: list[Case]) -> list[str]:
    """Lines of the results page: each model at the measured budget nearest to half of its MACs."""
    chosen = [(name, min(_budgets(engines, name), key=lambda one: abs(one - 0.5))) for name in SHOWN if name in engines]
    if not chosen:
        return []
    return ["", "## Summary", "", *SUMMARY, "", *overview(engines, measured, chosen), "", *CAVEATS]


def expectations(engines: dict[str, dict[str, Any]], measured: list[Case]) -> list[str]:
    """The README's table: models at 0.6 and 0.4 of their MACs, if measured; not SST-2, whose rows overlap training."""
    wanted = [(name, budget) for name in SHOWN if name != "minilm_sst2" for budget in (0.6, 0.4)]
    found = [(name, budget) for name, budget in wanted if budget in _budgets(engines, name)]
    return overview(engines, measured, found, machine=False)


def _budgets(engines: dict[str, dict[str, Any]], name: str) -> list[float]:
    return [result["budget"] for result in engines.get(name, {"results": []})["results"]]


def overview(
    engines: dict[str, dict[str, Any]], measured: list[Case], rows: list[tuple[str, float]], machine: bool = True
) -> list[str]:
    """A table with one row for each (recipe, budget): points lost, smallest speedup over batches, minutes, machine."""
    cases = {case.name: case for case in measured}
    lines = []
    for name, budget in rows:
        result = next(one for one in engines[name]["results"] if one["budget"] == budget)
        loss, place = result["accuracy"], result["environment"]
        least = min((one["speedup"] for one in result["latency"]), key=lambda gain: gain["median"])
        minutes = _minutes(result, cases.get(CASE_OF_RECIPE[name]))
        cells = [
            CASES[CASE_OF_RECIPE[name]].partition(",")[0],
            f"{result['macs']['ratio']:.0%}",
            f"{loss['drop']:z.2f} ({loss['drop_low']:z.2f} to {loss['drop_high']:z.2f})",
            faster(least),
            "-" if minutes is None else f"{minutes:.0f}",
        ]
        lines.append([*cells, *([f"{place['cpu']}, {place['cpus']} core{'s' * (place['cpus'] != 1)}"] * machine)])
    head = ["model", "MACs kept", "points lost", "speedup", "minutes", *(["machine"] * machine)]
    return markdown_table(head, lines)


def _minutes(result: dict[str, Any], case: Case | None) -> float | None:
    """Scores, loss curves and repair of the case at this budget, and this run's measurement.

    The median of all seeds and tables, because some were timed on a machine with much other work.
    """
    timed = [row for table in (case.tables if case else ()) for row in _defaults(table, result["budget"])]
    seconds = [sum(row[f"{part}_seconds"] for part in ("scoring", "curves", "surgery")) for row in timed]
    measuring = [stage["seconds"] for stage in result.get("stages", []) if stage["name"] == "measure"]
    return (statistics.median(seconds) + sum(measuring)) / 60 if seconds and measuring else None


def _defaults(table: Table, budget: float) -> list[dict[str, Any]]:
    """The timed rows of a budget by the default score and repair."""
    wanted = table.scorer, table.repair, budget
    rows = [row for row in table.rows if (row["scorer"], row["repair"], row["budget"]) == wanted]
    return [row for row in rows if "surgery_seconds" in row]


def sections(engines: dict[str, dict[str, Any]], measured: list[Case]) -> list[str]:
    """Lines of the page. measured: the cases, which know what their held-out rows are."""
    lines = ["", *HEAD] if engines else []
    documents = {case.name: case.document for case in measured}
    for name, content in engines.items():
        if _is_precision(content):
            continue
        lines += ["", f"### `recipes/{name}.yaml`", ""]
        document = documents.get(CASE_OF_RECIPE.get(name, ""), {})
        if "training_texts" in document:
            lines += [
                f"{training_texts(document)} [The torch models' table](#{anchor(document['case'])}) says more.",
                "",
            ]
        lines += table(content)
        if name in CASE_OF_RECIPE and _batch_one(content):
            case_name = CASE_OF_RECIPE[name]
            lines += ["", f"![{_latency_alt(case_name, content)}](figures/{case_name}-latency.svg)"]
    return lines + _precisions(engines)


def anchor(case: str) -> str:
    """Of the case's heading on the page."""
    words = f"{CASES[case]} {case}".lower().replace(",", "").replace(".", "")
    return "-".join(words.split())


def _is_precision(content: dict[str, Any]) -> bool:
    """Whether a recipe was run in another precision than fp32."""
    return content["results"][0].get("precision", "fp32") != "fp32"


def _precisions(engines: dict[str, dict[str, Any]]) -> list[str]:
    """The section of recipes that were run in another precision."""
    chosen = [content for content in engines.values() if _is_precision(content)]
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
        lines += ["", title, "", *unequal(content["results"]), *render_precision.table(content)]
        lines += ["", _machine(content["results"])]
    return lines


def unequal(results: list[dict[str, Any]]) -> list[str]:
    """The lines above a table of rows whose unpruned engines were not equally fast."""
    return marks.unequal(_unpruned(results))


def _unpruned(results: list[dict[str, Any]]) -> list[tuple[str, float]]:
    timed = [one for result in results for one in result["latency"]]
    return [
        (
            f"{one['target']}, batch {one['batch']}",
            (one["engines_ms"]["base"] if one.get("engines_ms") else one["base_ms"])["p50"],
        )
        for one in timed
    ]


def table(measured: dict[str, Any]) -> list[str]:
    """One recipe's measurements as a Markdown table, with the machine named below it."""
    head = "MACs kept|parameters kept|metric|unpruned|pruned|drop|batch|unpruned p50|pruned p50|speedup"
    columns = [*head.split("|"), "speedup x MACs kept"]
    return [
        *unequal(measured["results"]),
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
    told = (
        f" Other work took at most {max(others):.1%} of all CPU time during the measurement."
        if len(others) == len(seen)
        else ""
    )
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
                faster(speedup),
                f"{speedup['median'] * ratio:.2f}",
            ]
        )
    return rows


def _latency_alt(case_name: str, content: dict[str, Any]) -> str:
    parts = []
    for target, points in _batch_one(content).items():
        pruned = [f"{one.accuracy:.2f} at {one.ms:.3g} ms with {one.ratio:.0%} of the MACs" for one in points]
        base = f"unpruned {points[0].base:.2f} at {_base_ms(points):.3g} ms"
        parts.append(f"{target}: {base}; {', '.join(pruned)}")
    metric = content["results"][0]["accuracy"]["metric"]
    return f"{CASES[case_name]}: {metric} in points against median latency at batch 1. {'. '.join(parts)}"


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


def figures(engines: dict[str, dict[str, Any]]) -> dict[str, str]:
    """{file name: SVG} of latency against accuracy, one for each recipe of a case."""
    return {
        f"{CASE_OF_RECIPE[name]}-latency.svg": _plot(CASE_OF_RECIPE[name], content)
        for name, content in engines.items()
        if name in CASE_OF_RECIPE and _batch_one(content)
    }


def _plot(case_name: str, content: dict[str, Any]) -> str:
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
        apart = marks.apart(row for row in _unpruned(content["results"]) if row[0].endswith("batch 1"))
        if apart is not None:
            title += f"; unpruned medians differ by {100 * apart[0]:.0f} %: do not compare milliseconds of points"
        figure.suptitle(textwrap.fill(title, 76))

    metric = content["results"][0]["accuracy"]["metric"]
    return svg(f"{case_name}-latency", (7.2, 3.8), draw)


def _cycle(count: int) -> list[tuple[str, str]]:
    looks = list(SCORERS.values())
    return [looks[place % len(looks)] for place in range(count)]
