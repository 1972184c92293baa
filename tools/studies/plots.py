"""What the rendered pages share: sections and tables in Markdown, and plots as SVG of the measurements alone."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def markdown_table(columns: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a table."""
    return [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|", *(f"| {' | '.join(row)} |" for row in rows)]


def section(title: str, prose: list[str], columns: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a section of a page: its heading, its text, one table."""
    return [f"## {title}", "", *prose, "", *markdown_table(columns, rows)]


def faster(speedup: dict[str, float]) -> str:
    """A speedup and its interval, as a cell of a table."""
    return f"{speedup['median']:.2f}x ({speedup['ci_low']:.2f} to {speedup['ci_high']:.2f})"


def svg(name: str, size: tuple[float, float], draw: Callable[[Figure], None]) -> str:
    """Draw on a fresh white figure of that size [inches]; the same measurements give the same bytes."""
    import matplotlib.style
    from matplotlib.figure import Figure

    style = {
        "svg.hashsalt": name,
        "text.parse_math": False,
        "font.size": 9,
        "axes.titlesize": 9,
        "figure.titlesize": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "legend.frameon": False,
        "grid.alpha": 0.3,
    }
    with matplotlib.style.context(["default", style]):
        figure = Figure(figsize=size, layout="constrained", facecolor="white")
        draw(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator")))
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n"
