"""Warnings above a table whose rows must not be compared directly."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from held_out import CHOOSE

#: Share by which unpruned medians of one target and batch may differ between the rows of a table without a word.
ALLOWED = 0.10


def apart(rows: Iterable[tuple[str, float]]) -> tuple[float, str] | None:
    """By what share the unpruned medians differ that should be equal, and in words which they are; None if by little.

    rows: (what was timed: target, batch, ...; the unpruned engine's median in milliseconds) of every row.
    """
    medians: dict[str, list[float]] = {}
    for name, median in rows:
        medians.setdefault(name, []).append(median)
    share, name = max(((max(found) / min(found) - 1, name) for name, found in medians.items()), default=(0.0, ""))
    if share <= ALLOWED:
        return None
    return share, f"{name}: {min(medians[name]):.3g} to {max(medians[name]):.3g} ms"


def unequal(rows: Iterable[tuple[str, float]]) -> list[str]:
    """The lines above a table of engines, if their unpruned medians differ."""
    found = apart(rows)
    if found is None:
        return []
    return [
        f"**Unpruned medians differ by up to {100 * found[0]:.0f} % between rows ({found[1]}): the machine changed "
        "between them. The engines of one row were timed in turn: compare speedups, not milliseconds.**",
        "",
    ]


def halves(rows: list[dict[str, Any]]) -> tuple[str, Callable[[dict[str, Any]], str]]:
    """For a study: a sentence on the held-out rows of its points, and the mark after a row's points."""
    old = [row for row in rows if row.get("half") != CHOOSE]
    if not old:
        return "Points: on the half of the held-out rows that defaults are chosen by.", lambda row: ""
    if len(old) == len(rows):
        return "Points: on all held-out rows, the report half included (measured before the split).", lambda row: ""
    sentence = "Points: on the half of the held-out rows that defaults are chosen by; `*`: on all of them, the report"
    return f"{sentence} half included (measured before the split).", lambda row: " *" if row in old else ""
