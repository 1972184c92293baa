"""Plots of docs/results.md: accuracy against MACs kept, one for each table."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

from accuracy_tables import OWN, REPAIRED, REPAIRS, SCORERS, Case, Table
from plots import svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LINES = {"gauss-newton": "-.", "least-squares": "-", "distill": (0, (1, 1, 4, 1)), "rescale": ":", "none": "--"}


def file_name(case: Case, number: int) -> str:
    """Of the plot of the case's so manieth table."""
    return f"{case.name}-macs{f'-{number + 1}' if number else ''}.svg"


def figures(measured: list[Case]) -> dict[str, str]:
    """{file name: SVG} of every table."""
    numbered = ((case, number, table) for case in measured for number, table in enumerate(case.tables))
    return {file_name(case, number): _plot(table, file_name(case, number)) for case, number, table in numbered}


def alt(table: Table) -> str:
    """The plot's main numbers: OWN with its repair (or what there is), and the best of the others beside it."""
    key = (OWN, REPAIRED) if (OWN, REPAIRED) in table.lines else next(iter(table.lines))
    parts = []
    for budget, cell in table.lines[key].items():
        others = {
            scorer: line[budget].accuracy
            for (scorer, repair), line in table.lines.items()
            if repair == key[1] and scorer != key[0] and budget in line
        }
        best = max(others, key=others.__getitem__, default=None)
        beside = f" (best other scorer: {best} {others[best]:.2f})" if best is not None else ""
        parts.append(f"{cell.accuracy:.2f} at {cell.macs:.0%}{beside}")
    return (
        f"{table.title}, {_rows(table)}: {table.document['metric']} in points against MACs kept. "
        f"Unpruned {table.base:.2f}; {key[0]} with {REPAIRS.get(key[1], key[1])} {', '.join(parts)}"
    )


def _rows(table: Table) -> str:
    return f"{table.part} half" if table.part else "all held-out rows"


def _plot(table: Table, name: str) -> str:
    """Accuracy against MACs kept; where some lines fall far below, a second panel enlarges what stays near the top."""
    from matplotlib.lines import Line2D

    cells = {key: list(line.values()) for key, line in table.lines.items()}
    lowest = min(cell.accuracy - cell.spread for line in cells.values() for cell in line)
    highest = max(table.base, *(cell.accuracy + cell.spread for line in cells.values() for cell in line))
    near = cells.get((OWN, REPAIRED)) or max(cells.values(), key=lambda line: min(cell.accuracy for cell in line))
    span = max(1.4 * (table.base - min(cell.accuracy - cell.spread for cell in near)), 1.0)
    enlarged = table.base - lowest > 2.5 * span
    styles = {scorer: SCORERS.get(scorer, ("#666666", "*")) for scorer, _ in cells}
    repairs = [repair for repair in [*REPAIRS, *{repair for _, repair in cells}] if any(repair == r for _, r in cells)]

    def panel(axes: Axes, low: float, high: float) -> None:
        axes.axhline(table.base, color="#444444", linewidth=1)
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
        panels[0].set_ylabel(f"{table.document['metric']} (points)")
        if enlarged:
            panel(panels[1], table.base - span, max(highest, table.base + 0.1 * span))
            panels[0].set_title("all")
            panels[1].set_title("enlarged")
        handles = [Line2D([], [], color=styles[name][0], marker=styles[name][1], label=name) for name in styles]
        for repair in dict.fromkeys(repairs):
            face = "white" if repair == "none" else "#444444"
            look = {"marker": "o", "markerfacecolor": face, "linestyle": LINES.get(repair, "-.")}
            handles.append(Line2D([], [], color="#444444", label=REPAIRS.get(repair, repair), **look))
        handles.append(Line2D([], [], color="#444444", linewidth=1, label=f"unpruned, {table.base:.2f}"))
        figure.legend(handles=handles, loc="outside right center", handlelength=3)
        seeds = f"mean and standard deviation of {len(table.seeds)} seeds" if len(table.seeds) > 1 else "one seed"
        title = f"{table.title}, no retraining ({_rows(table)}; {seeds})"
        figure.suptitle(textwrap.fill(title, 90 if enlarged else 72))

    return svg(name.removesuffix(".svg"), (9.6 if enlarged else 7.2, 3.6), draw)
