"""A sweep: many runs of one recipe, by default one after another. Runs with equal scores are scored once, and a run
that measures has the machine for itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from optin_export.data import Sources, load_sources
from optin_export.errors import GateError, OptinError, ParityError
from optin_export.recipe import Recipe, Variant, expand
from optin_export.report import Report, costs_of
from optin_export.report.compare import compare
from optin_export.scoring import Spread, in_process
from optin_export.stages.context import Surroundings
from optin_export.stages.pipeline import Display, run
from optin_export.stages.preflight import shared_key
from optin_export.workdir.cache import FOLDER
from optin_export.workdir.files import remove, write_json, write_text
from optin_export.workdir.lock import held
from optin_export.workdir.measurement_lock import Machine
from optin_export.workdir.run_directory import clear_leftovers, forget

#: The sweep's index, in its folder: settings, folder and outcome of every run.
INDEX = "sweep.json"
#: The folder of the runs' shared steps, below the sweep's folder.
SHARED = ".shared"


@dataclass(frozen=True)
class Outcome:
    """How a run ended: the exit code that it would have had alone, and its verdict or error as text."""

    exit_code: int
    summary: str


Outcomes = dict[str, Outcome]


@dataclass(frozen=True)
class SubRun:
    """One run of a sweep. exit_code: the exit code that it would have alone; summary: its verdict, or its error."""

    label: str
    settings: dict[str, Any]
    folder: Path
    exit_code: int
    summary: str

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "folder": self.folder.name}


@dataclass(frozen=True)
class RunOptions:
    """How a run or a sweep is executed. stop_after: its last stage; None: all. force: ignore earlier results in the
    folder. redo: the stage from which on to ignore them. wait: wait for another process that works in the folder."""

    stop_after: str | None = None
    force: bool = False
    redo: str | None = None
    wait: bool = False


class Labelled:
    """A display that adds the run's label to each stage."""

    def __init__(self, display: Display, label: str) -> None:
        self.display, self.label = display, label
        self.tick, self.phase, self.expect = display.tick, display.phase, display.expect

    def start(self, stage: str) -> None:
        self.display.start(f"{self.label} {stage}")

    def finish(self, stage: str, seconds: float, reused: bool) -> None:
        self.display.finish(f"{self.label} {stage}", seconds, reused)

    def warn(self, text: str) -> None:
        self.display.warn(f"{self.label}: {text}")

    def note(self, text: str) -> None:
        self.display.note(f"{self.label}: {text}")


class Loaded:
    """Models and data of the sweep's recipes, loaded once for all that have the same."""

    def __init__(self) -> None:
        self.known: dict[str, Sources] = {}

    def of(self, recipe: Recipe) -> Sources:
        digest = shared_key(recipe)
        if digest not in self.known:
            self.known = {digest: load_sources(recipe)}  # one at a time: models are large
        return dataclasses.replace(self.known[digest], recipe=recipe)


@dataclass(frozen=True)
class Sweep:
    """The runs of one sweep, and their shared state. spread: recipe, hash of all that its scores depend on -> what
    executes the shards of its scoring."""

    folder: Path
    variants: tuple[Variant, ...]
    display: Display
    options: RunOptions = RunOptions()
    loaded: Loaded = field(default_factory=Loaded)
    machine: Machine = field(default_factory=Machine)
    spread: Callable[[Recipe, str], Spread] = lambda recipe, key: in_process

    def around(self, one: Variant) -> Surroundings:
        return Surroundings(
            lambda key: self.spread(one.recipe, key),
            self.machine.quiet,
            self.folder / SHARED,
            self.loaded.of(one.recipe),
        )

    def run(self, one: Variant, stop_after: str | None) -> Outcome:
        """Execute one run, up to the stage `stop_after`; an error is an outcome as well."""
        shown = Labelled(self.display, one.label)
        try:
            folder, around = self.folder / one.label, self.around(one)
            return outcome_of(run(one.recipe, folder, stop_after=stop_after, display=shown, around=around))
        except OptinError as error:
            return failed(error)


def in_turn(sweep: Sweep) -> Outcomes:
    """One run after another, in this process."""
    return {one.label: sweep.run(one, sweep.options.stop_after) for one in sweep.variants}


def run_sweep(
    recipe: Recipe,
    folder: Path,
    display: Display,
    options: RunOptions,
    run_all: Callable[[Sweep], Outcomes] = in_turn,
) -> list[SubRun]:
    """Run all combinations, each in a separate folder below `folder`; one that fails does not stop the others.

    Also writes the index sweep.json and the page that compares the runs. run_all: executes the runs, and returns how
    each ended.
    """
    with held(folder, "a sweep", options.wait):
        clear_leftovers(folder)
        sweep = Sweep(folder, tuple(expand(recipe)), display, options)
        if options.force:
            for name in (SHARED, "cluster/shards", *(f"{one.label}/{FOLDER}" for one in sweep.variants)):
                remove(folder / name)
        if options.redo is not None:
            forget(folder, options.redo)
        write_text(folder / "recipe.yaml", recipe.to_yaml())
        outcomes = run_all(sweep)
        found = [
            SubRun(one.label, one.settings, folder / one.label, **vars(outcomes[one.label])) for one in sweep.variants
        ]
        index = {"version": 1, "name": recipe.name, "runs": [one.to_json() for one in found]}
        write_json(folder / INDEX, {**index, "costs": costs_of(folder)})
        finished = [one.folder for one in found if (one.folder / "report.json").exists()]
        if len(finished) > 1:
            compare(finished, folder / "compare.html")
        return found


def outcome_of(report: Report | None) -> Outcome:
    if report is None:
        return Outcome(0, "stopped as asked")
    parity = any(gate.kind == "parity" and not gate.passed for gate in report.verdict.gates)
    code = 0 if report.verdict.passed else (ParityError if parity else GateError).exit_code
    return Outcome(code, report.verdict.summary)


def failed(error: OptinError) -> Outcome:
    return Outcome(error.exit_code, f"{error.what}: {error.why}; {error.fix}")
