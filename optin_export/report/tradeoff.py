"""Plot accuracy against cost: one panel per cost, for a single run and for the comparison of several runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from optin_export.recipe import model_of
from optin_export.recipe.tasks import is_lower_better
from optin_export.report.plots import BASE, INK, PRUNED, legend, render, short
from optin_export.report.schema import AccuracyResult, LatencyResult, Size

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Point:
    """cost: of the panel's axis. accuracy, low, high: of the metric, with its 95 % interval where there is one."""

    label: str
    cost: float
    accuracy: float
    low: float | None = None
    high: float | None = None
    model: Literal["base", "pruned"] = "pruned"
    front: bool = False


@dataclass(frozen=True)
class Panel:
    title: str
    xlabel: str
    points: tuple[Point, ...]


def interval(accuracy: AccuracyResult) -> tuple[float, float]:
    """The pruned model's metric, by the interval of what it lost against the unpruned one on the same rows."""
    sign = 1 if is_lower_better(accuracy.metric) else -1
    ends = (accuracy.base + sign * accuracy.drop_low, accuracy.base + sign * accuracy.drop_high)
    return min(ends), max(ends)


def panels_of(macs: Size, accuracy: AccuracyResult | None, latency: Sequence[LatencyResult]) -> list[Panel]:
    """One run: against MACs, and against the latency of the target whose engines gave the accuracy."""
    if accuracy is None:
        return []
    low, high = interval(accuracy)
    sizes = (
        Point("base", 100.0, accuracy.base, model="base"),
        Point("pruned", 100 * macs.ratio, accuracy.pruned, low, high),
    )
    panels = [Panel("MACs", "MACs (% of the base model)", sizes)]
    first = next((one.target for one in latency), None)
    for one in latency:
        if not one.judged or one.target != first:
            continue
        values = accuracy.engines or {"base": accuracy.base, "pruned": accuracy.pruned}
        clocked = one.engines_ms or {"base": one.base_ms, "pruned": one.pruned_ms}
        points = tuple(
            Point(
                name,
                clocked[name].p50,
                values[name],
                low if name == one.shipped else None,
                high if name == one.shipped else None,
                model="base" if model_of(name) == "base" else "pruned",
            )
            for name in clocked
            if name in values
        )
        panels.append(Panel(f"{one.target}, batch {one.batch}", "latency, p50 (ms)", points))
    return panels


def tradeoff(panels: Sequence[Panel], metric: str, name: str = "tradeoff") -> str:
    """An `<svg>`, or "" without panels. A line joins what no other point beats in both (`front`)."""
    panels = [panel for panel in panels if panel.points]
    if not panels:
        return ""
    columns = min(3 if len(panels) > 2 else 2, len(panels))
    rows = -(-len(panels) // columns)

    def draw(figure: Figure) -> None:
        grid = figure.subplots(rows, columns, squeeze=False, sharey=True).flatten()
        for axes in grid[len(panels) :]:
            axes.set_visible(False)
        for axes, panel in zip(grid, panels, strict=False):
            _panel(axes, panel)
        values = [value for panel in panels for p in panel.points for value in (p.accuracy, p.low, p.high) if value]
        if values and max(values) - min(values) < 1:  # otherwise hundredths of a point would look large
            middle = (max(values) + min(values)) / 2
            grid[0].set_ylim(middle - 1, middle + 1)
        for axes in grid[::columns]:
            axes.set_ylabel(metric + (" (lower is better)" if is_lower_better(metric) else " (points)"))
        legend(figure, grid[0])

    described = "; ".join(f"{panel.title}: {', '.join(map(_described, panel.points))}" for panel in panels)
    return render(name, f"{metric} against cost. {described}", 0.5 + 2.6 * rows, draw)


def _panel(axes: Axes, panel: Panel) -> None:
    from matplotlib.ticker import MaxNLocator

    best = sorted((point for point in panel.points if point.front), key=lambda point: point.cost)
    if len(best) > 1:
        axes.plot([p.cost for p in best], [p.accuracy for p in best], "-", color=INK, lw=1, alpha=0.6, label="front")
    styles: dict[str, tuple[str, str]] = {"base": ("s", BASE), "pruned": ("o", PRUNED)}
    for model, (marker, colour) in styles.items():
        chosen = [point for point in panel.points if point.model == model]
        if not chosen:
            continue
        axes.plot(
            [point.cost for point in chosen],
            [point.accuracy for point in chosen],
            marker,
            color=colour,
            fillstyle="none" if model == "base" else "full",
            label=model,
        )
    bars = [point for point in panel.points if point.low is not None and point.high is not None]
    for point in bars:
        axes.vlines(point.cost, point.low or 0, point.high or 0, color=PRUNED, linewidth=1.2)
    axes.set(title=short(panel.title, 40), xlabel=panel.xlabel)
    axes.margins(x=0.3, y=0.25)
    for point, above in zip(panel.points, _stacked(panel.points), strict=True):
        at = (point.cost, point.accuracy)
        axes.annotate(short(point.label, 24), at, (5, 4 + 9 * above), textcoords="offset points", fontsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.grid(True)


def _stacked(points: Sequence[Point]) -> list[int]:
    """The row, counted upwards, in which no labels overlap."""
    wide, high = (max(values) - min(values) for values in ([p.cost for p in points], [p.accuracy for p in points]))
    rows: dict[int, int] = {}
    for at in sorted(range(len(points)), key=lambda at: points[at].cost):
        near = {
            row
            for other, row in rows.items()
            if abs(points[at].cost - points[other].cost) <= 0.45 * wide
            and abs(points[at].accuracy - points[other].accuracy) <= 0.08 * high
        }
        rows[at] = next(row for row in range(len(points)) if row not in near)
    return [rows[at] for at in range(len(points))]


def _described(point: Point) -> str:
    return f"{point.label} {point.accuracy:.2f} at {point.cost:.3g}"
