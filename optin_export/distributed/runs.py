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
from optin_export.stages.sweep import RunOptions, SubRun, run_sweep
from optin_export.workdir.measurement_lock import Machine


def run_on_cluster(
    cluster: Options, recipe: Recipe, folder: Path, display: Display, options: RunOptions
) -> Report | list[SubRun] | None:
    """Execute a recipe on a cluster; returns a run's report (None if it stops before), or the runs of a sweep.

    Raises EnvironmentLacks if there is no such cluster.
    """
    with Session(cluster) as session:
        if session.dashboard:
            print(f"Ray's dashboard: http://{session.dashboard}", file=sys.stderr)
        if recipe.sweep:
            check_paths(recipe, session)
            return run_sweep(recipe, folder, display, options, partial(run_on_workers, session))
        book = Book(folder)
        around = Surroundings(
            spread=lambda key: spread_over(session, folder, key, book, options.force, recipe.model.gpus),
            quiet=Machine().quiet,
        )
        found = run(recipe, folder, display=display, around=around, **vars(options))
        if found is not None and recipe.fleet:
            display.start("fleet")
            with reporting(display.tick, display.phase):
                again = options.force or options.redo is not None
                target_nodes.measure_fleet(session, recipe, folder, Book(folder), again)
            found = run(recipe, folder)  # only the conclusions are computed again
        return found
