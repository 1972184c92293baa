"""The order of the stages: recipe -> sources -> scoring -> search -> surgery -> export -> engines -> measure -> ship ->
report. The only module that knows it; every stage reads what the one before wrote into the run folder."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

from optin_export import ship
from optin_export.displays import Quiet
from optin_export.errors import EnvironmentLacks, InputError
from optin_export.progress import reporting
from optin_export.recipe import Recipe, load_recipe, validate
from optin_export.report.schema import Report, StageResult
from optin_export.stages import export_and_measure, prune_and_repair, scoring, search, ship_and_report
from optin_export.stages.context import Facts, RunContext, Surroundings
from optin_export.workdir.durations import remember
from optin_export.workdir.files import clear_scratch
from optin_export.workdir.lock import held
from optin_export.workdir.peak_memory import forget_peak, peak_bytes
from optin_export.workdir.run_directory import STAGES, clear_leftovers, run_folder

#: Loading finds out what can be reused; the manifest and the report are cheap and always written again.
NEVER_REUSED = ("sources", "ship", "report")


class Display(Protocol):
    """Where progress goes; `optin_export.displays` has the ones of the command line."""

    def start(self, stage: str) -> None: ...

    def tick(self, done: int, total: int) -> None: ...

    def finish(self, stage: str, seconds: float, reused: bool) -> None: ...

    def warn(self, text: str) -> None: ...


def run(
    recipe: str | Path | dict[str, Any] | Recipe,
    out: str | Path | None = None,
    *,
    overrides: Iterable[str] = (),
    stop_after: str | None = None,
    force: bool = False,
    wait: bool = False,
    display: Display | None = None,
    around: Surroundings | None = None,
) -> Report | None:
    """Run a recipe (a file, a dictionary, or a validated `Recipe`) in the folder `out` (default `runs/<name>`).

    wait: for another process that works in the folder, instead of an error. around: what the run shares with others
    (see `cluster`). Returns the report, whose verdict may have failed; None if `stop_after` ended the run before it.
    Raises a subclass of OptinError for anything the user can mend.
    """
    if isinstance(recipe, str | Path):
        recipe = load_recipe(recipe, overrides)
    elif isinstance(recipe, dict):
        recipe = validate(recipe, Path.cwd())
    if recipe.sweep:
        raise InputError(
            "the recipe is a sweep", "it stands for several runs", "give it to the command line, or remove `sweep`"
        )
    if stop_after is not None and stop_after not in STAGES:
        raise InputError(f"unknown stage '{stop_after}'", f"the stages are {', '.join(STAGES)}", "name one of them")
    folder = run_folder(recipe, out)
    display = display or Quiet()
    with held(folder, "a run", wait), reporting(display.tick):
        ship.put_in_order(folder / "triton")
        clear_leftovers(folder)
        clear_scratch()
        return _stages(recipe, folder, force, display, stop_after, around or Surroundings())


def _stages(
    recipe: Recipe, folder: Path, force: bool, display: Display, stop_after: str | None, around: Surroundings
) -> Report | None:
    work = RunContext(recipe, folder, force, display.warn, around)
    stages: dict[str, Callable[[RunContext, Facts], Any]] = {
        "sources": scoring.load,
        "scoring": scoring.score,
        "search": search.find_plan,
        "surgery": prune_and_repair.apply_plan,
        "export": export_and_measure.export_models,
        "engines": export_and_measure.build_engines,
        "measure": export_and_measure.measure_engines,
        "ship": ship_and_report.ship_run,
        "report": lambda work, facts: ship_and_report.write_report(work, facts, timings),
    }
    timings: list[StageResult] = []
    facts: Facts = {}
    for name in STAGES:
        display.start(name)
        counted = forget_peak()
        start, executed = time.perf_counter(), work.cache.executed
        try:
            facts[name] = stages[name](work, facts)
        except OSError as error:  # what a stage reads was there when an earlier one ended
            raise EnvironmentLacks(
                f"stage {name} cannot use {error.filename or folder}",
                "it has vanished" if isinstance(error, FileNotFoundError) else error.strerror or str(error),
                "run the same command again: it makes only what is missing",
            ) from error
        reused = work.cache.executed == executed and name not in NEVER_REUSED
        seconds, peak = round(time.perf_counter() - start, 3), peak_bytes() if counted else None
        if not reused:
            remember(folder, name, seconds, peak)
        timings.append(StageResult(name=name, seconds=seconds, reused=reused, peak_bytes=peak))
        display.finish(name, timings[-1].seconds, reused)
        if name == stop_after and name != "report":
            return None
    return facts["report"]
