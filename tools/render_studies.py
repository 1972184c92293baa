"""The part of docs/results.md that comes from docs/measurements/studies/: how good, fast and large the sketch is, and
what joint selection, rounds, merged tokens, each part of the method and a short fine-tune are worth.

Written by tools/benchmark_scoring.py and the tools/study_*.py. What is not there is left out.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import marks
from plots import markdown_table, svg

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH_PLOT = "scoring-width.svg"
#: Required of the sketch: rank correlation, times faster than exact masking, memory of so many training steps.
CORRELATION, FASTER, MEMORY = 0.97, 50.0, 2.0


#: Of the study of intervals, in the order of the columns.
METHODS = ("one_instance", "in_rounds")


def sections(studies: Path) -> list[str]:
    """Lines of the page."""
    lines: list[str] = []
    for name, section in SECTIONS.items():
        content = _read(studies, name)
        if content is not None:
            lines += ["", *section(content)]
    return lines


def figures(studies: Path) -> dict[str, str]:
    """{file name: SVG} of their plots."""
    content = _read(studies, "scoring")
    return {} if content is None else {WIDTH_PLOT: _width_plot(content["width"])}


def _read(studies: Path, name: str) -> dict[str, Any] | None:
    path = studies / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _met(holds: bool) -> str:
    return "met" if holds else "missed"


def _scoring(content: dict[str, Any]) -> list[str]:
    one, machine = content["comparison"], content["machine"]
    chosen = next(row for row in one["sketch"] if row["probes"] == one["probes_compared"])
    worst = min(chosen["correlation_with_converged"])
    memory = content["memory_times_training_step"]
    rows = [
        [
            str(row["probes"]),
            f"{row['seconds']:.2f}",
            f"{one['exact_seconds'] / row['seconds']:.0f}",
            f"{min(row['correlation_with_converged']):.3f} to {max(row['correlation_with_converged']):.3f}",
        ]
        for row in one["sketch"]
    ]
    widths = content["width"]
    passes = [row["sketch_seconds"] / row["forward_seconds"] for row in widths]
    return [
        "## The sketch against exact masking",
        "",
        f"All {one['neurons']} neurons of {one['model']} on {one['sentences']} sentences ({one['tokens']} tokens), one",
        f"process, {machine['cpu']}, {machine['threads']} threads, torch {content['torch']}. Exact masking",
        f"(prefix replayed, batched) takes {one['exact_seconds']:.0f} s, measured on {one['exact_measured_on']} of the",
        f"neurons and scaled. Rank correlation is that with {one['converged_probes']} probes, over three seeds. Exact",
        "masking itself, which sees more than the second order,",
        f"correlates by {one['exact_correlation_with_converged']:.3f} with them.",
        "",
        *markdown_table(["probes", "seconds", "times faster than exact", "rank correlation"], rows),
        "",
        f"With {one['probes_compared']} probes: rank correlation {worst:.3f} at the worst seed (required",
        f"{CORRELATION}: {_met(worst >= CORRELATION)}), {one['times_faster']:.0f} times faster (required {FASTER:.0f}:",
        f"{_met(one['times_faster'] >= FASTER)}), peak memory {memory:.2f} times that of one training step with AdamW",
        f"(required at most {MEMORY:.0f}: {_met(memory <= MEMORY)}), both above a process that has loaded the model.",
        "",
        f"Cost over width: {widths[0]['units']} to {widths[-1]['units']} units,",
        f"{min(passes):.0f} to {max(passes):.0f} forward passes of that model, whatever their number.",
        "",
        f"![Cost of the sketch in forward passes for {widths[0]['units']} to {widths[-1]['units']} units: "
        + ", ".join(f"{value:.0f}" for value in passes)
        + f"](figures/{WIDTH_PLOT})",
    ]


def _width_plot(rows: list[dict[str, float]]) -> str:
    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        units = [row["units"] for row in rows]
        axes.plot(units, [row["sketch_seconds"] / row["forward_seconds"] for row in rows], "o-", color="#1f77b4")
        axes.set(xlabel="units scored (FFN neurons of a BERT with 4 layers)", ylabel="cost in forward passes")
        axes.set_xscale("log", base=2)
        axes.set_ylim(bottom=0)
        axes.grid(True)
        figure.suptitle("Cost of the sketch with 8 probes, random weights, 16 x 24 tokens")

    return svg("scoring-width", (6.4, 3.2), draw)


def _joint(content: dict[str, Any]) -> list[str]:
    halves, star = marks.halves(content["rows"])
    rows = [
        [
            f"`{row['case']}`",
            f"{row['budget']:g}",
            str(row["swaps"]),
            f"{row['estimate']:.4f}",
            f"{row['estimate_other_rows']:.4f}",
            f"{row['drop_unrepaired']:.2f}{star(row)}",
            f"{row['drop_repaired']:.2f}{star(row)}",
        ]
        for row in content["rows"]
    ]
    columns = ["case", "MACs", "swaps", "estimate", "on other rows", "lost, no repair", "lost, repaired"]
    return [
        "## Joint selection by swaps",
        "",
        "A unit's residual gradients under all probes embed it, so that the squared length of the sum over the removed",
        "units estimates the loss of removing them together. Starting from the knapsack's plan, kept and removed units",
        "of one group change places while that lowers the estimate (`tools/study_joint.py`); the estimate is",
        f"repeated on rows that the swaps did not see. {content['cpu']}.",
        halves,
        "",
        *markdown_table(columns, rows),
    ]


def _ablation(content: dict[str, Any]) -> list[str]:
    halves, star = marks.halves(content["rows"])
    rows = [
        [f"`{row['case']}`", f"{row['budget']:g}", row["left_out"], f"{row['drop']:.2f}{star(row)}"]
        for row in content["rows"]
    ]
    return [
        "## What each part is worth",
        "",
        "The same case, budget and seed with one part of the method left out, or with more of what the repair sees",
        "(`tools/study_ablation.py`): what was tried for the targets that are missed above, and what each part gains.",
        f"{content['cpu']}.",
        halves,
        "",
        *markdown_table(["case", "MACs", "left out, or more of", "points lost"], rows),
    ]


def _finetune(content: dict[str, Any]) -> list[str]:
    rows, (halves, star) = [], marks.halves(content["rows"])
    for row in sorted(content["rows"], key=lambda row: (row["case"], -row["budget"], row["steps"])):
        repaired = next(old for old in content["rows"] if old["steps"] == 0 and _case(old) == _case(row))
        losses = [f"{row[name]:.4f}" if row.get(name) is not None else "-" for name in ("before", "after")]
        rows.append(
            [
                f"`{row['case']}`",
                f"{row['budget']:g}",
                f"{row['steps']} at {row['learning_rate']:g}" if row["steps"] else "none",
                f"{row['accuracy']:.2f}",
                f"{row['base'] - row['accuracy']:.2f}{star(row)}",
                f"{row['accuracy'] - repaired['accuracy']:+.2f}" if row["steps"] else "-",
                *losses,
                str(row["seconds"]) + (" (discarded)" if row.get("note") else ""),
            ]
        )
    columns = [
        "case",
        "MACs",
        "steps",
        "accuracy",
        "points lost",
        "by the fine-tune",
        "loss before",
        "after",
        "seconds",
    ]
    return [
        "## With a short fine-tune",
        "",
        "The only numbers of this page with training in them. The model is pruned and repaired as above; then all",
        "weights are trained for a few steps by distillation from the unpruned model, on the unlabelled calibration",
        "rows (`finetune:` of a recipe, `recipes/cifar_transfer.yaml`, `tools/study_finetune.py`). The loss is that",
        "on spare calibration rows, accuracy that on the case's held-out rows; where that loss rises, the fine-tune is",
        "discarded and the repaired model stays, as in a run. Seconds are those",
        f"of the repair, then of the fine-tune alone. {content['cpu']}.",
        halves,
        "",
        *markdown_table(columns, rows),
    ]


def _case(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["case"], row["budget"], row["seed"]


def _rounds(content: dict[str, Any]) -> list[str]:
    halves, star = marks.halves(content["rows"])
    rows = [
        [
            f"`{row['case']}`",
            f"{row['budget']:g}",
            f"`{row['scorer']}`",
            str(row["rounds"]),
            f"{row['samples']:,}",
            f"{row['drop']:.2f}{star(row)}",
            f"{row['seconds']}",
        ]
        for row in sorted(content["rows"], key=lambda row: (row["case"], -row["budget"], row["samples"], row["rounds"]))
    ]
    return [
        "## Rounds of score, prune and repair",
        "",
        "The same budget reached in several rounds: the model repaired so far is scored anew and its loss curves are",
        "measured anew; the last plan is carried out on the original (`prune.rounds`, `tools/study_rounds.py`).",
        f"{content['cpu']}.",
        halves,
        "",
        *markdown_table(["case", "MACs", "score", "rounds", "images", "points lost", "seconds to choose"], rows),
    ]


def _share(content: dict[str, Any]) -> list[str]:
    rows, (halves, star) = [], marks.halves(content["rows"])
    for row in content["rows"]:
        share = f"{row['share']:g}" + (" (default)" if row["default"] else "")
        rows.append([f"`{row['case']}`", f"{row['budget']:g}", share, f"{row['drop']:.2f}{star(row)}"])
    return [
        "## The trajectory's share in the loss curves",
        "",
        "The budget is spent by the losses of keeping k units per sub-layer: a share of the trajectory's loss and the",
        f"rest of the output's, on one scale (`tools/study_share.py`). {content['cpu']}.",
        halves,
        "",
        *markdown_table(["case", "MACs", "share of the trajectory", "points lost"], rows),
    ]


def _tokens(content: dict[str, Any]) -> list[str]:
    halves, star = marks.halves(content["rows"])
    rows = [
        [
            f"`{row['case']}`",
            f"{row['budget']:g}",
            {"beta": "heads and neurons", "tau": "heads, neurons and tokens", "tokens": "tokens alone"}[row["way"]],
            "+".join(map(str, row["merged"])) if any(row["merged"]) else "-",
            f"{100 * row['macs']:.1f} %",
            f"{row['base'] - row['accuracy']:.2f}{star(row)}",
            f"{row['speedup'][0]:.2f} ({row['speedup'][1]:.2f} to {row['speedup'][2]:.2f})",
        ]
        for row in content["rows"]
    ]
    batches = ", ".join(str(batch) for batch in sorted({row["batch"] for row in content["rows"]}))
    floor = max(row["noise_floor"] for row in content["rows"])
    rows_used = ", ".join(str(count) for count in sorted({row["calibration_rows"] for row in content["rows"]}))
    return [
        "## Tokens",
        "",
        "Accuracy against measured latency for the same budget of MACs spent in three ways (`tools/study_tokens.py`):",
        "units alone (beta), units and merged tokens (tau, `tokens: {keep: auto}`), merged tokens alone. Speedup of",
        f"the onnxruntime engine over the unpruned one at batch {batches}, one thread, measured in turn on a machine",
        f"that was shared with other work; the unpruned engine against itself strays by up to {100 * floor:.0f} %.",
        f"{rows_used} calibration rows; {content['cpu']}.",
        halves,
        "",
        *markdown_table(["case", "MACs", "by", "merged per block", "MACs left", "points lost", "times faster"], rows),
    ]


def _latency(content: dict[str, Any]) -> list[str]:
    rows, (halves, star) = [], marks.halves(content["rows"])
    for row in content["rows"]:
        equal, plans = row["latency_over_macs"], (row["latency"], row["macs"])
        rows.append(
            [
                f"`{row['case']}`",
                str(row["batch"]),
                f"{row['asked']:g}x",
                f"{row['promised']:.2f}x",
                *(f"{plan['speedup']['median']:.2f}x" for plan in plans),
                f"{equal['median']:.3f} ({equal['low']:.3f} to {equal['high']:.3f})",
                *(f"{100 * plan['macs']:.1f} %" for plan in plans),
                *(f"{plan['drop']:.2f}{star(row)}" for plan in plans),
            ]
        )
    both = ("by the clock", "by MACs")
    columns = ["case", "batch", "asked", "promised", *(f"speedup, {one}" for one in both), "speed, clock / MACs"]
    columns += [f"MACs, {one}" for one in both] + [f"points lost, {one}" for one in both]
    better = [row["macs"]["drop"] - row["latency"]["drop"] for row in content["rows"]]
    won = sum(one > 0 for one in better)
    versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    return [
        "## By the clock or by MACs",
        "",
        "Scores and loss curves are the same; the knapsack adds up nanoseconds of the latency table",
        "(`prune.budget.speedup`, without corrections) or MACs. The MACs budget is the one at which its engine is as",
        "fast as the other's (`tools/study_latency.py`); speed, clock / MACs says how equal they were when both final",
        "engines and the unpruned one were timed interleaved (1: equal). Both repaired; points lost on the case's",
        "held-out rows,",
        f"one seed. {content['target']}, {content['cpu']}, {versions}.",
        halves,
        "",
        *markdown_table(columns, rows),
        "",
        f"The plan by the clock kept more accuracy in {won} of {len(better)} rows: by {min(better):+.2f} to",
        f"{max(better):+.2f} points, {sum(better) / len(better):+.2f} on average.",
    ]


#: Operators whose work goes with the MACs that pruning removes.
PRODUCTS = ("MatMul", "FusedMatMul", "Gemm", "Conv", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "QLinearMatMul")
LISTED_OPERATORS = 8


def _operators(content: dict[str, Any]) -> list[str]:
    engines = {row["engine"]: row["ms"] for row in content["rows"]}
    most = {name: max(ms.get(name, 0.0) for ms in engines.values()) for ms in engines.values() for name in ms}
    listed = sorted(most, key=lambda name: -most[name])[:LISTED_OPERATORS]
    totals = {name: sum(ms.values()) for name, ms in engines.items()}
    products = {name: sum(ms.get(one, 0.0) for one in PRODUCTS) for name, ms in engines.items()}

    def line(name: str, values: dict[str, float]) -> list[str]:
        return [name, *(f"{values[one]:.2f} ({100 * values[one] / totals[one]:.0f} %)" for one in engines)]

    rows = [line(f"`{name}`", {one: ms.get(name, 0.0) for one, ms in engines.items()}) for name in listed]
    rows += [line("all products", products), line("the rest", {one: totals[one] - products[one] for one in engines})]
    rows.append(line("sum", totals))
    return [
        "## Where the time of an engine goes",
        "",
        f"Milliseconds of one call by operator, and their share, for `{content['run']}` with {content['macs']:.0%} of",
        f"the MACs at batch {content['batch']} (`tools/study_operators.py`: profile of onnxruntime, in turn, median",
        f"of {content['calls']} calls, one thread). Products are what MACs count; the rest shrinks less with them.",
        f"{content['cpu']}, onnxruntime {content['onnxruntime']}.",
        "",
        *markdown_table(["operator", *(f"{name}" for name in engines)], rows),
    ]


def _fusion(content: dict[str, Any]) -> list[str]:
    rows = [
        [
            row["graph"],
            f"{row['batch']}",
            f"{row['fused_ms']:.3g} ms",
            f"{row['ms']:.3g} ms",
            f"{row['speedup']['median']:.2f}x ({row['speedup']['ci_low']:.2f} to {row['speedup']['ci_high']:.2f})",
        ]
        for row in content["rows"]
    ]
    return [
        "## LayerNormalization behind a sum, fused or not",
        "",
        "Engines of onnxruntime with SkipLayerNormFusion and without, as this package builds them, in the same blocks",
        f"of one process, one thread (`tools/study_fusion.py`); `{content['run']}` with {content['macs']:.0%} of the",
        f"MACs. {content['cpu']}, onnxruntime {content['onnxruntime']}.",
        "",
        *markdown_table(["graph", "batch", "fused", "not fused", "speedup without it"], rows),
    ]


def _neighbours(content: dict[str, Any]) -> list[str]:
    rows = [
        [
            f"`{row['run']}`, {row['macs']:.0%} of MACs, {row['precision']}",
            f"{row['batch']}",
            row["neighbour"] or "none",
            f"{row['seen']['others'] + row['seen']['stolen']:.1%}",
            f"{row['base_ms']:.3g} ms",
            f"{row['pruned_ms']:.3g} ms",
            f"{row['speedup']['median']:.2f}x ({row['speedup']['ci_low']:.2f} to {row['speedup']['ci_high']:.2f})",
            f"± {row['noise_floor']:.1%}",
        ]
        for row in content["rows"]
    ]
    head = ["run", "batch", "neighbour", "CPU time of others", "base fp32", "pruned", "speedup", "noise floor"]
    return [
        "## What a busy neighbour does to a speedup",
        "",
        f"Two engines, one thread on the first of {content['cpus']} CPUs: alone, and beside a process on another",
        "CPU that multiplies matrices in its cache, or copies arrays larger than any cache, or on all CPUs; then alone",
        f"(`tools/study_neighbours.py`). {content['cpu']}, onnxruntime {content['onnxruntime']}.",
        "",
        *marks.unequal(
            (f"`{row['run']}` {row['precision']}, batch {row['batch']}, no neighbour", row["base_ms"])
            for row in content["rows"]
            if not row["neighbour"]
        ),
        *markdown_table(head, rows),
    ]


def _interval(content: dict[str, Any]) -> list[str]:
    machines = {
        "noise": "calls and blocks vary",
        "drift": "all engines become slower",
        "clock": "the machine changes between two speeds",
        "instance": "a third of all loaded engines are slow by 8 %",
        "spread": "loaded engines differ by 4 % (standard deviation)",
        "everything": "all of it",
    }
    rows = []
    for name, words in machines.items():
        found = {row["method"]: row for row in content["rows"] if row["machine"] == name}
        cells = [f"{one['covered'] / one['runs']:.0%}, ± {one['half_width']:.1%}" for one in map(found.get, METHODS)]
        rows.append([words, *cells])
    runs = content["rows"][0]["runs"]
    return [
        "## How often the interval of a speedup holds the truth",
        "",
        f"Simulated: {runs} measurements of a true speedup of {content['truth']:g}x on each kind of machine, judged",
        "by the function that judges a run (`tools/study_interval.py`). Share of intervals that hold the truth, and",
        "half their median width. Loaded once: engines loaded once and a bootstrap over blocks, as before; in rounds:",
        "engines loaded again for every round.",
        "",
        *markdown_table(["what disturbs the machine", "loaded once", "in rounds"], rows),
    ]


def _shapes(content: dict[str, Any]) -> list[str]:
    rows = []
    for row in content["rows"]:
        speedup, seen = row["speedup"], row["neighbours"]
        rows.append(
            [
                f"`{row['model']}`",
                f"{row['macs']:.1%}",
                f"{row['batch']}",
                f"{row['base_ms']:.3g} ms",
                f"{row['pruned_ms']:.3g} ms",
                f"{speedup['median']:.2f}x ({speedup['ci_low']:.2f} to {speedup['ci_high']:.2f})",
                f"{speedup['median'] * row['macs']:.2f}",
                "-" if seen is None else f"{seen['others'] + seen['stolen']:.1%}",
            ]
        )
    versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    head = ["model", "MACs kept", "batch", "unpruned p50", "pruned p50", "speedup", "speedup x MACs kept", "other work"]
    return [
        "## How much of the removed MACs the clock sees",
        "",
        "Shapes alone: random weights, one CPU thread of onnxruntime, fp32 (`tools/study_shapes.py`). Other work:",
        f"the share of the CPU time that others took meanwhile. {content['cpu']}, {versions}.",
        "",
        *marks.unequal((f"`{row['model']}`, batch {row['batch']}", row["base_ms"]) for row in content["rows"]),
        *markdown_table(head, rows),
    ]


def _processors(content: dict[str, Any]) -> list[str]:
    rows = []
    for row in content["rows"]:
        units = row.get("units")
        rows.append(
            [
                f"`{row['recipe']}`",
                row["variant"],
                f"{row['accuracy']:.2f}",
                "" if units is None else f"{row['scores']:.1e}",
                "" if units is None else f"{units['differ']} of {units['kept']}",
                "" if units is None else f"{row['outputs']:.1e}",
            ]
        )
    head = ["recipe", "computed as", "accuracy", "scores differ", "kept units that differ", "outputs differ"]
    return [
        "## The same run on other processors",
        "",
        "Each recipe up to the export on the code paths that torch, oneDNN and MKL take on other processors, and with",
        "another number of threads (`tools/study_processors.py`), against the run on this processor with one thread.",
        "Scores: the largest difference relative to the largest score of its group. Units: kept by one only.",
        f"Outputs: of the smaller models, relative to the largest. {content['cpu']}, torch {content['torch']}.",
        *([f"Smaller than the recipe: `{' '.join(content['settings'])}`."] if content["settings"] else []),
        "",
        *markdown_table(head, rows),
    ]


SECTIONS = {
    "scoring": _scoring,
    "ablation": _ablation,
    "share": _share,
    "joint_selection": _joint,
    "rounds": _rounds,
    "latency": _latency,
    "operators": _operators,
    "fusion": _fusion,
    "shapes": _shapes,
    "neighbours": _neighbours,
    "interval": _interval,
    "processors": _processors,
    "tokens": _tokens,
    "finetune": _finetune,
}
