"""How much of the attempts is made: all of them (OPTIN_EXPORT_ATTACKS=all), or a thin part of each kind."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TypeVar

ALL = os.environ.get("OPTIN_EXPORT_ATTACKS") == "all"
First, Second = TypeVar("First"), TypeVar("Second")


def pairs(places: Sequence[First], things: Sequence[Second]) -> list[tuple[First, Second]]:
    """Every place with several things (which, differs by place); or every place and every thing at least once."""
    count = max(len(places), len(things))
    steps = range(0, len(things), 4) if ALL else (0,)
    return [(places[at % len(places)], things[(at + step) % len(things)]) for step in steps for at in range(count)]


def some(cases: Sequence[First], one_in: int) -> list[First]:
    """All the cases; or one of so many."""
    return list(cases) if ALL else list(cases)[::one_in]
