"""Studies of time and of machines on docs/results.md: budgets in time, operators, neighbours, intervals, processors."""

from __future__ import annotations

from typing import Any

import marks
from plots import faster, markdown_table, section

#: Of the study of intervals, in the order of the columns.
METHODS = ("one_instance", "in_rounds")


def latency(content: dict[str, Any]) -> list[str]:
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
        "fast as the other's (`tools/studies/study_latency.py`); speed, clock / MACs says how equal they",
        "were when both final",
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


def operators(content: dict[str, Any]) -> list[str]:
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
    prose = [
        f"Milliseconds of one call by operator, and their share, for `{content['run']}` with {content['macs']:.0%} of",
        f"the MACs at batch {content['batch']} (`tools/studies/study_operators.py`: profile of onnxruntime,",
        "in turn, median",
        f"of {content['calls']} calls, one thread). Products are what MACs count; the rest shrinks less with them.",
        f"{content['cpu']}, onnxruntime {content['onnxruntime']}.",
    ]
    return section("Where the time of an engine goes", prose, ["operator", *(f"{name}" for name in engines)], rows)


def fusion(content: dict[str, Any]) -> list[str]:
    rows = [
        [
            row["graph"],
            f"{row['batch']}",
            f"{row['fused_ms']:.3g} ms",
            f"{row['ms']:.3g} ms",
            faster(row["speedup"]),
        ]
        for row in content["rows"]
    ]
    prose = [
        "Engines of onnxruntime with SkipLayerNormFusion and without, as this package builds them, in the same blocks",
        f"of one process, one thread (`tools/studies/study_fusion.py`); `{content['run']}` with",
        f"{content['macs']:.0%} of the",
        f"MACs. {content['cpu']}, onnxruntime {content['onnxruntime']}.",
    ]
    return section(
        "LayerNormalization after a sum, fused or not",
        prose,
        ["graph", "batch", "fused", "not fused", "speedup without it"],
        rows,
    )


def neighbours(content: dict[str, Any]) -> list[str]:
    rows = [
        [
            f"`{row['run']}`, {row['macs']:.0%} of MACs, {row['precision']}",
            f"{row['batch']}",
            row["neighbour"] or "none",
            f"{row['seen']['others'] + row['seen']['stolen']:.1%}",
            f"{row['base_ms']:.3g} ms",
            f"{row['pruned_ms']:.3g} ms",
            faster(row["speedup"]),
            f"± {row['noise_floor']:.1%}",
        ]
        for row in content["rows"]
    ]
    head = ["run", "batch", "other process", "CPU time of others", "base fp32", "pruned", "speedup", "noise floor"]
    return [
        "## How other work distorts a speedup",
        "",
        f"Two engines, one thread on the first of {content['cpus']} CPUs: alone, then with a process on another",
        "CPU that multiplies matrices in its cache, or copies arrays larger than any cache, or on all CPUs; then alone",
        f"(`tools/studies/study_neighbours.py`). {content['cpu']}, onnxruntime {content['onnxruntime']}.",
        "",
        *marks.unequal(
            (f"`{row['run']}` {row['precision']}, batch {row['batch']}, alone", row["base_ms"])
            for row in content["rows"]
            if not row["neighbour"]
        ),
        *markdown_table(head, rows),
    ]


def busy(content: dict[str, Any]) -> list[str]:
    rows = [
        [
            "any" if row["other_work_accepted"] else "10 %",
            " and ".join(f"{share:.0%}" for share in row["other_work"]),
            " and ".join(f"{speedup:.2f}x" for speedup in row["speedups"]),
            f"{row['largest_speedup_times_macs']:.2f}",
            f"{row['warnings']}",
            f"{row['verdict']} ({row['exit_code']})",
        ]
        for row in content["rows"]
    ]
    head = [
        "other work allowed",
        "seen, batch 1 and 8",
        "speedup",
        "largest speedup x MACs",
        "warnings",
        "verdict (exit code)",
    ]
    broken = sum(bool(row["broken_rules"]) for row in content["rows"])
    machine = content["machine"]
    prose = [
        f"The whole run next to {content['processes']} processes that compute without pause",
        "(`tools/studies/study_busy.py`).",
        "Two rules: never PASSED with a speedup that is more than 1.3 times what the MACs explain, and never PASSED",
        f"without the warnings in the same line. Broken in {broken} of {len(content['rows'])} runs. {machine['cpu']},",
        f"{machine['cpus']} CPUs, onnxruntime {content['packages']['onnxruntime']}.",
    ]
    return section("The quickstart on a busy machine", prose, head, rows)


def interval(content: dict[str, Any]) -> list[str]:
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
    prose = [
        f"Simulated: {runs} measurements of a true speedup of {content['truth']:g}x on each kind of machine, with",
        "the function that a run uses",
        "(`tools/studies/study_interval.py`). Share of intervals that contain the true value, and",
        "half their median width. Loaded once: engines loaded once and a bootstrap over blocks, as before; in rounds:",
        "engines loaded again for every round.",
    ]
    return section(
        "How often the interval of a speedup contains the true value",
        prose,
        ["what disturbs the machine", "loaded once", "in rounds"],
        rows,
    )


def shapes(content: dict[str, Any]) -> list[str]:
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
                faster(speedup),
                f"{speedup['median'] * row['macs']:.2f}",
                "-" if seen is None else f"{seen['others'] + seen['stolen']:.1%}",
            ]
        )
    versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    head = ["model", "MACs kept", "batch", "unpruned p50", "pruned p50", "speedup", "speedup x MACs kept", "other work"]
    return [
        "## How much of the removed MACs the clock sees",
        "",
        "Only shapes matter here: random weights, one CPU thread of onnxruntime, fp32",
        "(`tools/studies/study_shapes.py`).",
        f"Other work: the share of the CPU time of other processes. {content['cpu']}, {versions}.",
        "",
        *marks.unequal((f"`{row['model']}`, batch {row['batch']}", row["base_ms"]) for row in content["rows"]),
        *markdown_table(head, rows),
    ]


def processors(content: dict[str, Any]) -> list[str]:
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
    prose = [
        "Each recipe up to the export on the code paths that torch, oneDNN and MKL take on other processors, and with",
        "another number of threads (`tools/studies/study_processors.py`), against the run on this processor",
        "with one thread.",
        "Scores: the largest difference relative to the largest score of its group. Units: kept by one only.",
        f"Outputs: of the smaller models, relative to the largest. {content['cpu']}, torch {content['torch']}.",
        *([f"Smaller than the recipe: `{' '.join(content['settings'])}`."] if content["settings"] else []),
    ]
    return section("The same run on other processors", prose, head, rows)
