"""The part of docs/results.md that comes from docs/measurements/studies/: how good, fast and large the sketch is, and
what joint selection, rounds, merged tokens, each part of the method and a short fine-tune are worth.

Written by benchmark_scoring.py and the study_*.py. What is not there is left out.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import marks
import render_bfloat16
import render_cost
import render_cpu_engines
import render_endurance
import render_quantizers
import render_real_models
import render_speech
import render_timing
from plots import markdown_table, section, svg

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH_PLOT = "scoring-width.svg"
#: Required of the sketch: rank correlation, times faster than exact masking, memory of so many training steps.
CORRELATION, FASTER, MEMORY = 0.97, 50.0, 2.0


def sections(studies: Path) -> list[str]:
    """Lines of the page."""
    lines: list[str] = []
    for name, render in SECTIONS.items():
        content = _read(studies, name)
        if content is not None:
            lines += ["", *render(content)]
    return lines


def figures(studies: Path) -> dict[str, str]:
    """{file name: SVG} of their plots."""
    content = _read(studies, "scoring")
    plots = {} if content is None else {WIDTH_PLOT: _width_plot(content["width"])}
    for name in render_cpu_engines.NAMES_OF:
        if (engines := _read(studies, name)) is not None:
            plots |= render_cpu_engines.figures(engines, name)
    return plots


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
    prose = [
        "A unit's residual gradients under all probes embed it, so that the squared length of the sum over the removed",
        "units estimates the loss of removing them together. Starting from the knapsack's plan, kept and removed units",
        "of one group are exchanged while that lowers the estimate (`tools/studies/study_joint.py`); the estimate is",
        f"repeated on rows that the swaps did not see. {content['cpu']}.",
        halves,
    ]
    return section("Joint selection by swaps", prose, columns, rows)


def _ablation(content: dict[str, Any]) -> list[str]:
    halves, star = marks.halves(content["rows"])
    rows = [
        [f"`{row['case']}`", f"{row['budget']:g}", row["left_out"], f"{row['drop']:.2f}{star(row)}"]
        for row in content["rows"]
    ]
    prose = [
        "The same case, budget and seed with one part of the method left out, or with more of what the repair sees",
        "(`tools/studies/study_ablation.py`): what was tried for the targets that are missed above, and what",
        "each part gains.",
        f"{content['cpu']}.",
        halves,
    ]
    return section("What each part is worth", prose, ["case", "MACs", "left out, or more of", "points lost"], rows)


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
    prose = [
        "The only numbers of this page with training. The model is pruned and repaired as above; then all",
        "weights are trained for a few steps by distillation from the unpruned model, on the unlabelled calibration",
        "rows (`finetune:` of a recipe, `recipes/cifar_transfer.yaml`, `tools/studies/study_finetune.py`).",
        "The loss is that",
        "on spare calibration rows, accuracy that on the case's held-out rows; where that loss rises, the fine-tune is",
        "discarded and the repaired model stays, as in a run. Seconds are those",
        f"of the repair, then of the fine-tune alone. {content['cpu']}.",
        halves,
    ]
    return section("With a short fine-tune", prose, columns, rows)


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
    prose = [
        "The same budget reached in several rounds: the model repaired so far is scored again and its loss curves are",
        "measured again; the last plan is carried out on the original. Recipes had `prune.rounds` for this; it was",
        "removed: on this one case of one seed two rounds gain nothing, and four gain little for six times the time.",
        "Measured by `tools/study_rounds.py` of commit `4e46411` (2026-11-24, version 0.1.0), which is in the",
        "repository's history and no longer runs.",
        f"{content['cpu']}.",
        halves,
    ]
    return section(
        "Rounds of score, prune and repair",
        prose,
        ["case", "MACs", "score", "rounds", "images", "points lost", "seconds to choose"],
        rows,
    )


def _share(content: dict[str, Any]) -> list[str]:
    rows, (halves, star) = [], marks.halves(content["rows"])
    for row in content["rows"]:
        share = f"{row['share']:g}" + (" (default)" if row["default"] else "")
        rows.append([f"`{row['case']}`", f"{row['budget']:g}", share, f"{row['drop']:.2f}{star(row)}"])
    prose = [
        "The budget is spent by the losses of keeping k units per sub-layer: a share of the trajectory's loss and the",
        f"rest of the output's, on one scale (`tools/studies/study_share.py`). {content['cpu']}.",
        halves,
    ]
    return section(
        "The trajectory's share in the loss curves",
        prose,
        ["case", "MACs", "share of the trajectory", "points lost"],
        rows,
    )


def _curves(content: dict[str, Any]) -> list[str]:
    budgets = list(content["rows"][0]["loss"])
    least = {row["case"]: row["loss"] for row in content["rows"] if row["way"] == "measured at all counts"}
    rows = [
        [
            f"`{row['case']}`",
            row["way"],
            f"{row['passes'] / row['rows']:.0f}",
            *(f"{row['loss'][budget] / least[row['case']][budget]:.2f}" for budget in budgets),
        ]
        for row in content["rows"]
    ]
    prose = [
        "The loss of a plan by curves that are measured at all counts on all rows, relative to the least one, which is",
        "that of the plan made by these curves; the other plans are made by curves to second order, corrected by the",
        "points named (`tools/studies/study_curves.py`, seed 0). *Passes*: of these rows, through the whole model.",
        "A run takes two points on a quarter of the rows; of convolutional models four, on as many rows as six passes",
        f"of the calibration rows allow. {content['cpu']}.",
    ]
    columns = ["case", "curves", "passes", *(f"at {budget} of the MACs" for budget in budgets)]
    return section("Loss curves to second order, or measured", prose, columns, rows)


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
    prose = [
        "Accuracy against measured latency for the same budget of MACs spent in three ways",
        "(`tools/studies/study_tokens.py`):",
        "units alone (beta), units and merged tokens (tau, `tokens: {keep: auto}`), merged tokens alone. Speedup of",
        f"the onnxruntime engine over the unpruned one at batch {batches}, one thread, measured in turn on a machine",
        f"that was shared with other work; the unpruned engine against itself differs by up to {100 * floor:.0f} %.",
        f"{rows_used} calibration rows; {content['cpu']}.",
        halves,
    ]
    return section(
        "Tokens", prose, ["case", "MACs", "by", "merged per block", "MACs left", "points lost", "times faster"], rows
    )


def _attacks(content: dict[str, Any]) -> list[str]:
    rows = [[one["kind"], f"{one['attempts']}", f"{one['clean']}"] for one in content["kinds"]]
    rows.append(["all", f"{content['attempts']}", f"{content['clean']}"])
    machine = content["environment"]
    prose = [
        "Command lines with hostile input (`tools/studies/study_attacks.py`, `tests/attacks`). Refused cleanly: in",
        "time, with the exit code of a refusal and three printable lines; no code of the input has run, no process was",
        "started, nobody connected to, no file changed outside. Where a command may do without a file (a resumed run",
        "makes it again) or where what is wrong is its answer (`verify`), that end is as good.",
        f"{machine['cpu']}, optin-export {machine['optin_export']}, Python {machine['python']}.",
    ]
    return section("Hostile input", prose, ["kind", "attempts", "refused cleanly"], rows)


SECTIONS: dict[str, Callable[[dict[str, Any]], list[str]]] = {
    "real_models": render_real_models.real_models,
    "scoring": _scoring,
    "ablation": _ablation,
    "share": _share,
    "curves": _curves,
    "joint_selection": _joint,
    "rounds": _rounds,
    "latency": render_timing.latency,
    "operators": render_timing.operators,
    "fusion": render_timing.fusion,
    "shapes": render_timing.shapes,
    "neighbours": render_timing.neighbours,
    "busy": render_timing.busy,
    "interval": render_timing.interval,
    "processors": render_timing.processors,
    "tokens": _tokens,
    "finetune": _finetune,
    "whisper": render_speech.whisper,
    **{name: partial(render_cpu_engines.sections, name=name) for name in render_cpu_engines.NAMES_OF},
    "quantizers": render_quantizers.quantizers,
    "cost": render_cost.cost,
    "bfloat16": render_bfloat16.bfloat16,
    "attacks": _attacks,
    "kills": render_endurance.kills,
    "soak": render_endurance.soak,
}
