"""One run with help: its scoring on the cluster's workers, its clock alone on the machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from optin_export.cluster.costs import Book
from optin_export.cluster.machine import Machine
from optin_export.cluster.scoring import spread_over
from optin_export.pipeline import Display, run
from optin_export.recipe import Recipe
from optin_export.workspace import Surroundings

if TYPE_CHECKING:
    from optin_export.cluster.ray_session import Session
    from optin_export.report import Report


def run_with(
    session: Session, recipe: Recipe, folder: Path, *, display: Display, force: bool, stop_after: str | None
) -> Report | None:
    """`pipeline.run` with the session's workers; the same run folder and the same results."""
    book, machine = Book(folder), Machine()
    around = Surroundings(
        spread=lambda key: spread_over(session, folder, key, book, force),
        quiet=machine.quiet,
    )
    return run(recipe, folder, stop_after=stop_after, force=force, display=display, around=around)
