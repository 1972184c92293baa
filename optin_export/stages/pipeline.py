"""The order of the stages, from loading to the report, which only this module defines. A stage takes the run context
and the results of earlier stages, and reads the files that they wrote into the run directory."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

from optin_export import ship
from optin_export.displays import Quiet
from optin_export.errors import EnvironmentLacks, InputError
from optin_export.progress import reporting
from optin_export.recipe import Recipe, load_recipe, validate
from optin_export.report.schema import Report, StageResult
from optin_export.stages.build import build_engines
from optin_export.stages.context import RunContext, Surroundings
from optin_export.stages.curves import measure_curves
from optin_export.stages.export import export_models
from optin_export.stages.forecast import Forecast, recall_forecast, remember_forecast, unforeseen
from optin_export.stages.load import load
from optin_export.stages.measure import measure_engines
from optin_export.stages.prediction import prediction
from optin_export.stages.prune_and_repair import apply_plan
from optin_export.stages.report import write_report
from optin_export.stages.results import SearchResult
from optin_export.stages.score import score
from optin_export.stages.search import find_plan
from optin_export.stages.ship import ship_run
from optin_export.workdir.durations import recall, remember
from optin_export.workdir.files import clear_scratch
from optin_export.workdir.lock import held
from optin_export.workdir.peak_memory import forget_peak, peak_bytes, release_freed
from optin_export.workdir.run_directory import STAGES, clear_leftovers, forget, run_folder

#: Loading determines what can be reused; the manifest and the report are cheap and always rewritten.
NEVER_REUSED = ("sources", "ship", "report")
P = ParamSpec("P")
Result = TypeVar("Result")


class Display(Protocol):
    """Receives progress; `optin_export.displays` has the command line's displays."""

    def expect(self, seconds: Mapping[str, float | None]) -> None: ...

    def start(self, stage: str) -> None: ...

    def phase(self, name: str, until: float | None) -> None: ...

    def tick(self, done: int, total: int) -> None: ...

    def finish(self, stage: str, seconds: float, reused: bool) -> None: ...

    def warn(self, text: str) -> None: ...

    def note(self, text: str) -> None: ...


def run(
    recipe: str | Path | dict[str, Any] | Recipe,
    out: str | Path | None = None,
    *,
    overrides: Iterable[str] = (),
    stop_after: str | None = None,
    force: bool = False,
    redo: str | None = None,
    wait: bool = False,
    display: Display | None = None,
    around: Surroundings | None = None,
) -> Report | None:
    """Run a recipe (a file, a dictionary, or a validated `Recipe`) in the folder `out` (default `runs/<name>`).

    redo: a stage that is executed again although its results could be reused, and all that depend on it. wait: wait
    for another process that works in the folder, instead of an error. around: state that the run shares
    with others (see `sweep` and `distributed`). Returns the report, whose verdict may have failed; None if `stop_after`
    ended the run before it. Raises a subclass of OptinError for anything that the user can fix.
    """
    if isinstance(recipe, str | Path):
        recipe = load_recipe(recipe, overrides)
    elif isinstance(recipe, dict):
        recipe = validate(recipe, Path.cwd())
    if recipe.sweep:
        raise InputError(
            "the recipe is a sweep", "it stands for several runs", "give it to the command line, or remove `sweep`"
        )
    for stage in (stop_after, redo):
        if stage is not None and stage not in STAGES:
            raise InputError(f"unknown stage '{stage}'", f"the stages are {', '.join(STAGES)}", "name one of them")
    folder = run_folder(recipe, out)
    display = display or Quiet()
    with held(folder, "a run", wait), reporting(display.tick, display.phase):
        ship.put_in_order(folder / "triton")
        clear_leftovers(folder)
        clear_scratch()
        if redo is not None:
            forget(folder, redo)
        work = RunContext(recipe, folder, force, display.warn, around)
        return _stages(work, display, stop_after)


def _stages(work: RunContext, display: Display, stop_after: str | None) -> Report | None:
    stage = _Stages(work, display, stop_after)
    try:
        stage.run("sources", load)
        stage.expect()
        scores = stage.run("scoring", score)
        curves = stage.run("curves", measure_curves, scores)
        found = stage.run("search", find_plan, scores, curves)
        pruned = stage.run("surgery", apply_plan, found.plan)
        stage.run("export", export_models)
        built = stage.run("engines", build_engines)
        judged = stage.run("measure", measure_engines, found.plan, pruned)
        stage.run("ship", ship_run, judged)
        return stage.run("report", write_report, scores, found, pruned, built, judged, stage.timings)
    except _StoppedAsAsked:
        return None


class _StoppedAsAsked(Exception):
    """The stage of `stop_after` is done."""


class _Stages:
    """Runs one stage after another, and records the cost of each."""

    def __init__(self, work: RunContext, display: Display, stop_after: str | None) -> None:
        self.work, self.display, self.stop_after = work, display, stop_after
        self.timings: list[StageResult] = []
        self.forecast: Forecast | None = None

    def expect(self) -> None:
        """Forecast the run, unless its stages have been executed before with this recipe."""
        self.forecast = recall_forecast(self.work)
        if self.forecast is None:
            self.display.phase("timing the model", None)
            self.forecast = remember_forecast(self.work)
            if self.forecast is not None:
                self.display.note(f"expected: {self.forecast}")
        if self.forecast is not None:
            known = {name: one["seconds"] for name, one in recall(self.work.folder).items()}
            self.display.expect({**dict.fromkeys(unforeseen(self.work.recipe)), **self.forecast.seconds, **known})

    def run(
        self,
        name: str,
        function: Callable[Concatenate[RunContext, P], Result],
        *results: P.args,
        **named: P.kwargs,
    ) -> Result:
        """Run a stage and return its result. Raises _StoppedAsAsked if it was the last one."""
        self.display.start(name)
        folder, cache, counted = self.work.folder, self.work.cache, forget_peak()
        start, executed = time.perf_counter(), cache.executed
        try:
            found = function(self.work, *results, **named)
        except OSError as error:  # the files that a stage reads existed when an earlier stage ended
            raise EnvironmentLacks(
                f"stage {name} cannot use {error.filename or folder}",
                "it has vanished" if isinstance(error, FileNotFoundError) else error.strerror or str(error),
                "run the same command again: it makes only what is missing",
            ) from error
        release_freed()
        reused = cache.executed == executed and name not in NEVER_REUSED
        seconds, peak = round(time.perf_counter() - start, 3), peak_bytes() if counted else None
        if not reused:
            remember(folder, name, seconds, peak)
        expected = self.forecast
        self.timings.append(
            StageResult(
                name=name,
                seconds=seconds,
                reused=reused,
                first_seconds=recall(folder).get(name, {}).get("seconds") if reused else None,
                expected_seconds=None if expected is None else expected.seconds.get(name),
                expected_peak_bytes=None if expected is None else expected.peak_bytes.get(name),
                peak_bytes=peak,
            )
        )
        self.display.finish(name, seconds, reused)
        if isinstance(found, SearchResult) and not reused:
            self.display.note(f"predicted: {prediction(found.plan, self.work.sources.model.output_kind)}")
        if name == self.stop_after and name != STAGES[-1]:
            raise _StoppedAsAsked
        return found
