"""Execute a run or a sweep on a cluster, with the same run folder and results as without."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

from optin_export.distributed import target_nodes
from optin_export.distributed.costs import Book
from optin_export.distributed.ray_session import Options, Session
from optin_export.distributed.scoring import spread_over
from optin_export.distributed.sweep import check_paths, run_on_workers
from optin_export.progress import reporting
from optin_export.recipe import Recipe
from optin_export.report import Report
from optin_export.stages.context import Surroundings
from optin_export.stages.pipeline import Display, run
from optin_export.stages.sweep import SubRun, run_sweep
from optin_export.workdir.measurement_lock import Machine


def run_on_cluster(
    options: Options,
    recipe: Recipe,
    folder: Path,
    display: Display,
    *,
    stop_after: str | None = None,
    force: bool = False,
    wait: bool = False,
) -> Report | list[SubRun] | None:
    """Execute a recipe on a cluster; returns a run's report (None if it stops before), or the runs of a sweep.

    Raises EnvironmentLacks if there is no such cluster.
    """
    with Session(options) as session:
        if session.dashboard:
            print(f"Ray's dashboard: http://{session.dashboard}", file=sys.stderr)
        if recipe.sweep:
            check_paths(recipe, session)
            how = partial(run_on_workers, session)
            return run_sweep(recipe, folder, display, stop_after=stop_after, force=force, wait=wait, run_all=how)
        book = Book(folder)
        around = Surroundings(
            spread=lambda key: spread_over(session, folder, key, book, force, recipe.model.gpus), quiet=Machine().quiet
        )
        found = run(recipe, folder, stop_after=stop_after, force=force, wait=wait, display=display, around=around)
        if found is not None and recipe.fleet:
            display.start("fleet")
            with reporting(display.tick):
                target_nodes.measure_fleet(session, recipe, folder, Book(folder), force)
            found = run(recipe, folder)  # only the conclusions are computed again
        return found
