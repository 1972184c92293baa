"""What the command line has done: one run or a sweep, alone or with a cluster's help."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from optin_export.distributed import sweep, target_nodes
from optin_export.distributed.costs import Book
from optin_export.distributed.measurement_lock import Machine
from optin_export.progress import reporting
from optin_export.recipe import Recipe
from optin_export.stages.context import Surroundings
from optin_export.stages.pipeline import Display, run
from optin_export.workdir.lock import held
from optin_export.workdir.run_directory import clear_leftovers

if TYPE_CHECKING:
    from optin_export.distributed.ray_session import Options, Session
    from optin_export.report import Report


@dataclass(frozen=True)
class Order:
    recipe: Recipe
    folder: Path
    stop_after: str | None = None
    force: bool = False
    wait: bool = False


def carry_out(order: Order, options: Options | None, display: Display) -> Report | list[sweep.SubRun] | None:
    """The report of a run (None if it was to stop before), or the runs of a sweep.

    The same run folder and results with a cluster as without. Raises EnvironmentLacks where there is no such cluster.
    """
    with contextlib.ExitStack() as stack:
        session = None
        if options is not None:
            from optin_export.distributed.ray_session import Session

            session = stack.enter_context(Session(options))
            if session.dashboard:
                print(f"Ray's dashboard: http://{session.dashboard}", file=sys.stderr)
        if order.recipe.sweep:
            stack.enter_context(held(order.folder, "a sweep", order.wait))
            clear_leftovers(order.folder)
            return sweep.run_sweep(order.recipe, order.folder, session, display, order.force, order.stop_after)
        return _run(order, session, display)


def _run(order: Order, session: Session | None, display: Display) -> Report | None:
    around = None
    if session is not None:
        from optin_export.distributed.scoring import spread_over

        workers, book = session, Book(order.folder)
        around = Surroundings(
            spread=lambda key: spread_over(workers, order.folder, key, book, order.force, order.recipe.model.gpus),
            quiet=Machine().quiet,
        )
    found = run(
        order.recipe,
        order.folder,
        stop_after=order.stop_after,
        force=order.force,
        wait=order.wait,
        display=display,
        around=around,
    )
    if session is not None and found is not None and order.recipe.fleet:
        display.start("fleet")
        with reporting(display.tick):
            target_nodes.measure_fleet(session, order.recipe, order.folder, Book(order.folder), order.force)
        found = run(order.recipe, order.folder)  # nothing is done again but the conclusions
    return found
