"""The sections of docs/results.md about engines of one CPU, from docs/measurements/studies/cpu_engines*.json."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from plots import markdown_table, svg

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Name of the results -> title of the section.
NAMES_OF = {
    "cpu_engines": "Every engine of one CPU, pruned or not",
    "cpu_engines_without_vnni": "The same engines on a CPU without instructions for int8",
}
AGAINST = ("base", "onnxruntime fp32")
#: Goals: run -> batch -> times faster than the unpruned fp32 model in onnxruntime, at most LOST points lost.
GOALS = {"minilm-sts": {1: 5.0, 8: 8.0}, "mpnet-sts": {1: 5.0, 8: 8.0}, "deit-tiny-photos": {1: 3.0}}
LOST = 1.0
NAMES, COLORS = {"base": "unpruned", "pruned": "pruned"}, {"base": "#7f7f7f", "pruned": "#1f77b4"}
Row = dict[str, Any]


def sections(content: dict[str, Any], name: str = "cpu_engines") -> list[str]:
    """Lines of the section: a table, a plot and the goals of every run."""
    versions = [f"{key} {content[key]}" for key in ("onnxruntime", "openvino", "nncf") if key in content]
    lines = [f"## {NAMES_OF[name]}", ""]
    if name == "cpu_engines":
        lines += [
            "The unpruned and the pruned graph of a run in every form that a user of one CPU could take",
            "(`tools/studies/study_cpu_engines.py`): each engine loaded twice in one process, all instances in",
            "turns in the same blocks, one thread. Times faster than the unpruned model in fp32 onnxruntime, with",
            "the interval over blocks; by the CPU time of the process in brackets, which other work on the machine",
            "disturbs less. Points lost against the same model, on the run's evaluation rows, with a 95 %",
            "interval. *quantize_dynamic*: onnxruntime's function as a user calls it; *dynamic int8*: as a recipe",
            "does it. What it says holds for this processor: see the next section for another one.",
        ]
    else:
        lines += ["The same study on another machine."]
    lines += [f"{content['cpu']}, {_instructions(content)}; {', '.join(versions)}."]
    for (run, kept), rows in _runs(content):
        lines += ["", f"### {_titled(run, kept, name)}", ""]
        lines += markdown_table(*_table(rows))
        lines += ["", *_goals(run, rows), "", _image(run, kept, name, rows)]
    return lines


def _instructions(content: dict[str, Any]) -> str:
    """What the processor computes with."""
    found = {"int8 (VNNI or AMX)": content["int8_instructions"], "bf16": content.get("bf16_instructions", False)}
    phrases = []
    for word, wanted in (("with", True), ("without", False)):
        some = [name for name, there in found.items() if there is wanted]
        phrases += [f"{word} instructions for {' and '.join(some)}"] if some else []
    return ", ".join(phrases)


def _titled(run: str, kept: float, name: str) -> str:
    return f"{run}, {kept:.0%} of the MACs" + ("" if name == "cpu_engines" else ", without instructions for int8")


def choices(content: dict[str, Any], runs: Sequence[tuple[str, str, float]]) -> list[str]:
    """Lines of the README about (run, title, share of the MACs): the model as it is and pruned, each in fp32 and in the
    fastest form that loses at most LOST points at the smallest batch."""
    stored, lines, batches = dict(_runs(content)), [], list[int]()
    for run, title, share in runs:
        rows = next(rows for (name, kept), rows in stored.items() if name == run and abs(kept - share) < 0.01)
        batches = _batches(rows)
        for model, state in (("base", "as it is"), ("pruned", f"pruned to {share:.0%}")):
            for form in dict.fromkeys([AGAINST[1], best(rows, batches[0], model)["form"]]):
                found = {row["batch"]: row for row in rows if (row["model"], row["form"]) == (model, form)}
                one = found[batches[0]]
                lost = "-" if (model, form) == AGAINST else f"{one['lost']:z.2f} ({_span(one)})"
                times = [f"{found[batch]['speedup']['median']:.2f}x" for batch in batches]
                lines.append([f"{title}, {state}", form, lost, *times])
    return markdown_table(["model", "engine", "points lost", *(f"batch {batch}" for batch in batches)], lines)


def _span(row: Row) -> str:
    return f"{row['lost_low']:z.2f} to {row['lost_high']:z.2f}"


def figures(content: dict[str, Any], name: str = "cpu_engines") -> dict[str, str]:
    """{file name: SVG}: points lost against speedup, a plot per run."""
    return {_file(*key, name): _plot(*key, name, rows) for key, rows in _runs(content)}


def _runs(content: dict[str, Any]) -> Iterator[tuple[tuple[str, float], list[Row]]]:
    """((run, share of the MACs of its pruned model), rows), the largest share first."""
    pruned = {row["run"]: row["macs"] for row in content["rows"] if row["model"] == "pruned"}

    def key(row: Row) -> tuple[str, float]:
        return row["run"], row.get("kept", pruned[row["run"]])

    ordered = sorted(content["rows"], key=lambda row: (key(row)[0], -key(row)[1]))
    for found, rows in groupby(ordered, key):
        yield found, list(rows)


def _batches(rows: list[Row]) -> list[int]:
    return sorted({row["batch"] for row in rows})


def _table(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    batches, lines = _batches(rows), []
    for model, form in dict.fromkeys((row["model"], row["form"]) for row in rows):
        found = {row["batch"]: row for row in rows if (row["model"], row["form"]) == (model, form)}
        one = found[batches[0]]
        lost = f"{one['lost']:z.2f} ({_span(one)})"
        lines.append(
            [
                NAMES[model],
                form,
                "-" if (model, form) == AGAINST else lost,
                *(_times(found[batch]) for batch in batches),
            ]
        )
    return ["model", "engine", "points lost", *(f"batch {batch}" for batch in batches)], lines


def _times(row: Row) -> str:
    times, cpu = row["speedup"], row["speedup_cpu"]
    return f"{times['median']:.2f}x ({times['low']:.2f} to {times['high']:.2f}) [{cpu['median']:.2f}]"


def best(rows: list[Row], batch: int, model: str) -> Row:
    """The fastest form of the pruned or unpruned model that loses at most LOST points, or the least that any loses."""
    some = [row for row in rows if row["batch"] == batch and row["model"] == model]
    return max(
        some, key=lambda row: (row["lost"] <= LOST, row["speedup"]["median"] if row["lost"] <= LOST else -row["lost"])
    )


def _goals(run: str, rows: list[Row]) -> list[str]:
    lines = []
    for batch in _batches(rows):
        whole, pruned = (f"{model} {_told(best(rows, batch, kind))}" for kind, model in NAMES.items())
        gain = best(rows, batch, "pruned")["speedup"]["median"]
        goal = _goal(GOALS.get(run, {}).get(batch), gain)
        lines.append(f"- Batch {batch}, at most {LOST:g} point lost: {whole}, {pruned}{goal}")
    return lines


def _told(row: Row) -> str:
    return f"{row['speedup']['median']:.2f}x ({row['form']}, {row['lost']:z.2f} lost)"


def _goal(goal: float | None, gain: float) -> str:
    if goal is None:
        return "."
    return f". Goal {goal:g}x: " + ("met." if gain >= goal else f"missed by {goal - gain:.2f}.")


def _file(run: str, kept: float, name: str) -> str:
    return f"{name.replace('_', '-')}-{run}-{kept * 100:.0f}.svg"


def _image(run: str, kept: float, name: str, rows: list[Row]) -> str:
    batch = _batches(rows)[0]
    named = ", ".join(f"{name} {_told(best(rows, batch, model))}" for model, name in NAMES.items())
    said = f"{run}: points lost against times faster, every engine. Fastest at batch {batch}: {named}"
    return f"![{said}](figures/{_file(run, kept, name)})"


def _plot(run: str, kept: float, name: str, rows: list[Row]) -> str:
    def draw(figure: Figure) -> None:
        batches = _batches(rows)
        for axes, batch in zip(figure.subplots(1, len(batches), squeeze=False)[0], batches, strict=True):
            for row in (row for row in rows if row["batch"] == batch):
                place, color = (row["speedup"]["median"], row["lost"]), COLORS[row["model"]]
                axes.plot(*place, "o", color=color)
                axes.annotate(
                    row["form"].replace("onnxruntime", "ort"),
                    place,
                    fontsize=6,
                    xytext=(3, 3),
                    textcoords="offset points",
                )
            axes.set(xlabel="times faster than unpruned fp32 onnxruntime", ylabel="points lost", title=f"batch {batch}")
            axes.grid(True)
        figure.suptitle(f"{run}: unpruned (grey), and pruned to {kept:.0%} of the MACs (blue)")

    return svg(_file(run, kept, name), (9.0, 3.6), draw)
