"""Plots of the report as inline SVG: deterministic, transparent, and in the text colour of the page around them.

Every function returns one `<svg>` element, or "" where there is nothing to draw. Colours are Okabe-Ito's with at least
3:1 contrast on white and on near-black; colour is never the only difference: shape, line style or label differ too.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from optin_export.recipe import MODELS, engine_name
from optin_export.report.schema import GroupResult, LatencyResult

if TYPE_CHECKING:  # matplotlib takes longer to import than to draw: `compare` refuses runs without it
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

BASE, PRUNED = "#d55e00", "#0072b2"  # Okabe-Ito vermillion and blue
#: Drawn in this colour, written as currentColor: the page decides, light or dark.
INK = "#123456"
WIDTH = 7.2  # inches
#: Columns of the heat map at most: more cannot be distinguished at the width of the page.
BINS = 96
STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a '$' in a name is a '$'
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "legend.frameon": False,
    "grid.alpha": 0.2,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
    "grid.color": INK,
}


def latency(entries: Sequence[Mapping[str, Any]]) -> str:
    """Cumulative distributions of base and pruned, one panel per entry of measure/latency.json, milliseconds.

    Axes end at the larger 99th percentile, as the rare slowest calls would squeeze everything else.
    """
    entries = [entry for entry in entries if entry.get("samples")]
    columns, rows = min(2, len(entries)), -(-len(entries) // 2)
    if not entries:
        return ""

    def draw(figure: Figure) -> None:
        from matplotlib.ticker import MaxNLocator

        panels = figure.subplots(
            rows, columns, squeeze=False, sharey=True, gridspec_kw={"wspace": 0.1, "hspace": 0.1}
        ).flatten()
        for axes in panels[len(entries) :]:
            axes.set_visible(False)
        quantiles = np.linspace(0, 1, 201)
        for axes, entry in zip(panels, entries, strict=False):
            samples = {arm: np.concatenate([np.ravel(block) for block in arms]) for arm, arms in _arms(entry).items()}
            for arm, colour, line in (("base", BASE, "--"), ("pruned", PRUNED, "-")):
                axes.plot(np.quantile(samples[arm], quantiles), 100 * quantiles, line, color=colour, label=arm, lw=1.6)
            start, end = (
                pick(np.quantile(arm, at) for arm in samples.values()) for pick, at in ((min, 0), (max, 0.99))
            )
            margin = 0.04 * (end - start) or 0.05 * end or 1.0
            axes.set(title=_where(entry["target"], entry["batch"]), xlabel="latency (ms)", ylim=(0, 101))
            axes.set_xlim(start - margin, end + margin)
            axes.xaxis.set_major_locator(MaxNLocator(5))
            axes.grid(True)
        for axes in panels[::columns]:
            axes.set_ylabel("calls at most this slow (%)")
        legend(figure, panels[0])

    label = "Cumulative latency distributions in milliseconds of base and pruned engine, one panel per batch size"
    return render("latency", label, 0.4 + 2.4 * rows, draw)


def importance(scores: Mapping[str, np.ndarray], groups: Sequence[GroupResult]) -> str:
    """Heat map of scores: one panel per kind, one row per block, units sorted from most to least important.

    scores: {"blockNN.kind": [units]}. A mark in each row shows the share of kept units.
    """
    named = {(int(match[1]), match[2]): score for key, score in scores.items() if (match := KEY.fullmatch(key))}
    tables = {kind: _table(named, kind) for kind in dict.fromkeys(kind for _, kind in sorted(named))}
    tables = {kind: table for kind, table in tables.items() if np.isfinite(table).any()}
    if not tables:
        return ""

    def draw(figure: Figure) -> None:
        from matplotlib import colormaps
        from matplotlib.colors import LogNorm

        for axes, (kind, table) in zip(_row(figure, len(tables)), tables.items(), strict=True):
            blocks = sorted(block for block, other in named if other == kind)
            low, high = float(np.nanmin(table)), float(np.nanmax(table))
            norm = LogNorm(low if low < high else low / 2, high)
            extent = (0, 100, len(blocks) - 0.5, -0.5)
            cmap = colormaps["cividis"].resampled(32)
            image = axes.imshow(table, cmap=cmap, norm=norm, extent=extent, aspect="auto", interpolation="none")
            kept = [
                (100 * group.kept / group.count, blocks.index(group.block))
                for group in groups
                if group.kind == kind and group.block in blocks
            ]
            for share, row in kept:
                axes.plot([share] * 2, [row - 0.5, row + 0.5], color="black", linewidth=3.5, clip_on=False)
                axes.plot([share] * 2, [row - 0.42, row + 0.42], color="white", linewidth=1.5, clip_on=False)
            axes.set(title=short(kind), xlabel=f"{short(kind)}, most important first (%)", xlim=(0, 100))
            _block_axis(axes, blocks)
            bar = figure.colorbar(image, ax=axes, label="score (log scale)")
            _log_ticks(bar.ax.yaxis, [low, high])

    label = f"Importance scores of {' and '.join(tables)} per block, sorted; a mark shows the share kept"
    return render("importance", label, 1.2 + 0.17 * max(map(len, tables.values())), draw)


def speedup(results: Sequence[LatencyResult], required: float | None) -> str:
    """Speedup with its 95 % interval per target and batch; shaded: the noise floor around 1; dashed: the gate."""
    if not results:
        return ""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        rows = np.arange(len(results))
        median, low, high = np.array([[r.speedup.median, r.speedup.ci_low, r.speedup.ci_high] for r in results]).T
        floor = np.array([r.noise_floor for r in results])
        axes.barh(rows, 2 * floor, 0.8, left=1 - floor, color=INK, alpha=0.25, label="noise floor")
        axes.axvline(1, color=INK, linewidth=0.8)
        if required is not None:
            axes.axvline(required, color=BASE, linestyle="--", linewidth=1.6, label=f"gate {required:g}x")
        # An interval of resampled medians need not contain the median of the whole sample.
        error = np.maximum([median - low, high - median], 0)
        axes.errorbar(median, rows, xerr=error, fmt="o", color=PRUNED, capsize=4, label="speedup, 95 % interval")
        for value, row, end in zip(median, rows, high, strict=True):
            at = (max(end, value), row)
            axes.annotate(f"{value:.2f}x", at, (7, 0), textcoords="offset points", va="center")
        edges = [0.95, 1.05, *low, *high, *(1 - floor), *(1 + floor), *([required] if required is not None else [])]
        width = max(edges) - min(edges)
        axes.set(xlabel="speedup, base latency / pruned latency (x)", ylim=(len(rows) - 0.4, -0.6))
        axes.set_xlim(min(edges) - 0.03 * width, max(edges) + 0.12 * width)
        axes.set_yticks(rows, [_where(r.target, r.batch) for r in results])
        axes.grid(True, axis="x")
        legend(figure, axes)

    label = "Speedup with 95 % interval per batch size, noise floor and gate; the numbers are in the latency table"
    return render("speedup", label, 1.0 + 0.38 * len(results), draw)


def compensation(groups: Sequence[GroupResult]) -> str:
    """Squared error of every repaired sub-layer before and after compensation, log scale; zeros cannot be drawn."""
    repaired = [group for group in groups if group.error_before and group.error_after]
    errors = [value for group in repaired for value in (group.error_before, group.error_after) if value]
    kinds, blocks = _kinds(repaired), sorted({group.block for group in repaired})
    if not repaired:
        return ""

    def draw(figure: Figure) -> None:
        for axes, kind in zip(_row(figure, len(kinds), sharex=True), kinds, strict=True):
            chosen = [group for group in repaired if group.kind == kind]
            rows = [blocks.index(group.block) for group in chosen]
            before, after = ([getattr(group, f"error_{when}") for group in chosen] for when in ("before", "after"))
            axes.hlines(rows, before, after, color=INK, linewidth=0.8, alpha=0.6)
            axes.plot(before, rows, "o", color=BASE, label="before", fillstyle="none", markeredgewidth=1.5)
            axes.plot(after, rows, "s", color=PRUNED, label="after", markersize=5)
            axes.set(title=short(kind), xlabel="squared error per element", xscale="log")
            _log_ticks(axes.xaxis, errors)  # panels share the axis
            axes.grid(True, axis="x")
            _block_axis(axes, blocks)
        legend(figure, axes)

    label = "Squared error per block before and after compensation; the numbers are in the table of units"
    return render("compensation", label, 1.2 + 0.2 * len(blocks), draw)


KEY = re.compile(r"block(\d+)\.(\w+)")


def _table(named: Mapping[tuple[int, str], np.ndarray], kind: str) -> np.ndarray:
    """Sorted scores of one kind, [blocks, columns]; NaN where there is no positive score, as a log scale has none."""
    chosen = [np.sort(np.ravel(named[key]))[::-1] for key in sorted(named) if key[1] == kind]
    columns = min(BINS, max(len(score) for score in chosen))
    at = (np.arange(columns) + 0.5) / max(columns, 1)
    rows = [score[(at * len(score)).astype(int)] if len(score) else np.full(columns, np.nan) for score in chosen]
    table = np.asarray(rows, dtype=np.float64)
    return np.where(np.isfinite(table) & (table > 0), table, np.nan)


def _arms(entry: Mapping[str, Any]) -> dict[str, list[list[float]]]:
    """The judged pair: both models in the entry's precision."""
    samples, precision = entry["samples"], entry.get("precision", "fp32")
    base, pruned = (samples[engine_name(model, precision)] for model in MODELS)
    return {"base": base + samples.get("again", []), "pruned": pruned}


def _kinds(groups: Sequence[GroupResult]) -> list[str]:
    return list(dict.fromkeys(group.kind for group in groups))


def short(name: str, most: int = 32) -> str:
    """A shortened name that leaves space for the plot; the tables have the full name."""
    return name if len(name) <= most else f"{name[: most - 1]}…"


def _where(target: str, batch: int) -> str:
    return f"{short(target)}, batch {batch}"


def _row(figure: Figure, panels: int, *, sharex: bool = False) -> list[Axes]:
    return list(figure.subplots(1, panels, squeeze=False, sharex=sharex)[0])


def _block_axis(axes: Axes, blocks: Sequence[int], *, every: bool = False) -> None:
    """Block numbers downwards, as the data flows; not every one is written where rows are narrow."""
    step = 1 if every else max(1, round(len(blocks) / 12))
    axes.set_yticks(range(0, len(blocks), step), [str(block) for block in blocks[::step]])
    axes.set(ylabel="block", ylim=(len(blocks) - 0.4, -0.6))
    axes.tick_params(axis="y", length=0)


def _log_ticks(axis: Axis, values: Sequence[float]) -> None:
    """Few ticks, in plain text: matplotlib's own are mathematical markup, which the page's font could not replace."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    decades = np.log10(max(values) / min(values))
    axis.set_major_locator(LogLocator(subs=(1.0,) if decades > 1 else (1.0, 2.0, 5.0), numticks=8))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0e}"))


def legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels))


def render(name: str, label: str, height: float, draw: Callable[[Figure], None]) -> str:
    """Draw on a fresh figure [inches] and return its SVG, adapted for a page with several figures."""
    from matplotlib import style
    from matplotlib.figure import Figure

    # The salt makes the ids of clip paths and markers reproducible.
    with style.context(["default", {**STYLE, "svg.hashsalt": name}]):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        draw(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return _inline(buffer.getvalue(), name, label)


def _inline(svg: str, name: str, label: str) -> str:
    """Strip parts that only a separate file needs; make ids unique in the page; leave colour and font to the page."""
    view = re.search(r'viewBox="[^"]*"', svg)
    body = svg[svg.index(">", svg.index("<svg")) + 1 :]
    body = re.sub(r"<style.*?</style>|<!--.*?-->|<metadata.*?</metadata>", "", body, flags=re.DOTALL)
    # matplotlib uses the same group ids in every figure: keep only ids that are referred to, and prefix them.
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', body))
    body = re.sub(r' id="([^"]*)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", body)
    body = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", body)
    body = re.sub(r"font: (\d[\d.]*px) [^;\"]*", r"font-size: \1", body)
    body = re.sub(r"\n\s*", "\n", body.replace(INK, "currentColor"))
    assert view is not None
    return f'<svg class="plot" role="img" aria-label="{html.escape(label)}" {view[0]}>{body.strip()}'
