"""A sweep: many runs of one recipe. Scoring is done once for all that score alike; the rest one after another, or all
at once on a cluster's workers. Who measures has the machine for itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optin_export.data import Sources, load_sources
from optin_export.distributed import target_nodes
from optin_export.distributed.costs import Book, costs_of
from optin_export.distributed.file_transfer import pack, unpack
from optin_export.distributed.measurement_lock import Machine
from optin_export.distributed.remote_tasks import Outcome, failed, outcome_of, run_away
from optin_export.errors import InputError, OptinError
from optin_export.recipe import Recipe, Variant, expand
from optin_export.report.compare import compare
from optin_export.stages.context import Surroundings
from optin_export.stages.pipeline import Display, run
from optin_export.stages.preflight import shared_key
from optin_export.workdir.cache import FOLDER as LEDGER
from optin_export.workdir.files import remove, write_json, write_text
from optin_export.workdir.run_directory import STAGES

if TYPE_CHECKING:
    from optin_export.distributed.ray_session import Session

#: The sweep's index, in its folder: settings, folder and outcome of every run.
INDEX = "sweep.json"
#: Where runs leave what they share, below the sweep's folder.
SHARED = ".shared"
#: The last stage that is done here, once for all runs that have it in common.
COMMON = "curves"
Outcomes = dict[str, Outcome]


@dataclass(frozen=True)
class SubRun:
    """One run of a sweep. exit_code: what it alone would have ended with; summary: its verdict, or its error."""

    label: str
    settings: dict[str, Any]
    folder: Path
    exit_code: int
    summary: str

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "folder": self.folder.name}


class Labelled:
    """A display that says whose stage it is."""

    def __init__(self, display: Display, label: str) -> None:
        self.display, self.label, self.tick = display, label, display.tick

    def start(self, stage: str) -> None:
        self.display.start(f"{self.label} {stage}")

    def finish(self, stage: str, seconds: float, reused: bool) -> None:
        self.display.finish(f"{self.label} {stage}", seconds, reused)

    def warn(self, text: str) -> None:
        self.display.warn(f"{self.label}: {text}")


class Loaded:
    """Models and data of the sweep's recipes, loaded once for all that have the same."""

    def __init__(self) -> None:
        self.known: dict[str, Sources] = {}

    def of(self, recipe: Recipe) -> Sources:
        digest = shared_key(recipe)
        if digest not in self.known:
            self.known = {digest: load_sources(recipe)}  # one at a time: models are large
        return dataclasses.replace(self.known[digest], recipe=recipe)


def run_sweep(
    recipe: Recipe,
    folder: Path,
    session: Session | None,
    display: Display,
    force: bool = False,
    stop_after: str | None = None,
) -> list[SubRun]:
    """Run all combinations, each in a folder of its own below `folder`; one that fails does not stop the others.

    Also writes the index sweep.json and the page that compares the runs.
    """
    variants = expand(recipe)
    if session is not None and not session.shared_files:
        for one in variants:
            _refuse_paths(one.recipe)
    if force:
        for name in (SHARED, "cluster/shards", *(f"{one.label}/{LEDGER}" for one in variants)):
            remove(folder / name)
    write_text(folder / "recipe.yaml", recipe.to_yaml())
    book, loaded, machine = Book(folder), Loaded(), Machine()
    outcomes: Outcomes = {}

    def around(one: Variant) -> Surroundings:
        spread = Surroundings().spread
        if session is not None:
            from optin_export.distributed.scoring import spread_over

            spread = lambda key: spread_over(session, folder, key, book, gpus=one.recipe.model.gpus)  # noqa: E731
        return Surroundings(spread, machine.quiet, folder / SHARED, loaded.of(one.recipe))

    alone = session is None or stop_after in STAGES[: STAGES.index(COMMON) + 1]
    for one in variants:
        stage = stop_after if alone else COMMON
        try:
            shown = Labelled(display, one.label)
            done = run(
                one.recipe,
                folder / one.label,
                stop_after=stage,
                display=shown,
                around=around(one),
            )
            if alone:
                outcomes[one.label] = outcome_of(done)
        except OptinError as error:
            outcomes[one.label] = failed(error)
    if session is not None and not alone:
        waiting = [one for one in variants if one.label not in outcomes]
        display.start("runs")
        outcomes |= _fan_out(session, waiting, folder, loaded, book, display.tick)
        for one in waiting:
            if one.recipe.fleet and (folder / one.label / "report.json").exists():
                target_nodes.measure_fleet(session, one.recipe, folder / one.label, book, display.tick, force)
                outcomes[one.label] = outcome_of(run(one.recipe, folder / one.label, around=around(one)))
    book.save()
    found = [
        SubRun(one.label, one.settings, folder / one.label, outcomes[one.label].exit_code, outcomes[one.label].summary)
        for one in variants
    ]
    write_json(
        folder / INDEX,
        {"version": 1, "name": recipe.name, "runs": [one.to_json() for one in found], "costs": costs_of(folder)},
    )
    compare_runs(folder, [one.folder for one in found])
    return found


def _refuse_paths(recipe: Recipe) -> None:
    """A whole run reads these files where it is. Scoring does not: it is sent the model and the batches."""
    data, tune = recipe.data, recipe.finetune
    rows = [data.calibration, data.evaluation, None if tune is None else tune.data]
    code = [recipe.model.source, None if tune is None else tune.source]
    by_path = [one for one in code if one is not None and one.startswith("py:") and ".py:" in one.removeprefix("py:")]
    by_path += [one.source for one in rows if one is not None and one.source.startswith("images:")]
    if by_path:
        raise InputError(
            "a sweep on this cluster cannot use the recipe's files",
            f"'{by_path[0]}' is read by its path, which other nodes may not have",
            "put it on a file system that all nodes see and add --shared-files, or use --cluster local",
        )


def _fan_out(
    session: Session,
    variants: Sequence[Variant],
    folder: Path,
    loaded: Loaded,
    book: Book,
    tick: Callable[[int, int], None],
) -> Outcomes:
    """Everything after the scoring, of all runs at once; one worker each, with the GPUs that its recipe names."""
    from optin_export.distributed.ray_session import no_gpus

    messages, stages = session.messages(), 0
    tasks, references = {}, {}
    outcomes: Outcomes = {}
    for one in variants:
        gpus = max(one.recipe.model.gpus, int(any(target.device == "cuda" for target in one.recipe.here)))
        if gpus and session.missing({"GPU": gpus}):
            outcomes[one.label] = failed(no_gpus(gpus))  # and not: waits for ever
            continue
        place, shared = folder / one.label, folder / SHARED
        files = None if session.shared_files else pack(place, [p for p in place.rglob("*") if p.is_file()])
        sources = loaded.of(one.recipe)
        known = id(sources.loaded)
        if known not in references:
            # The model once for all runs that have it; a reference of its own for each would send it as often.
            references = {known: session.put(sources)}
        tasks[
            session.submit(
                run_variant,
                one.recipe,
                references[known],
                place.resolve() if files is None else files,
                shared.resolve() if files is None else None,
                messages,
                resources={"GPU": gpus} if gpus else None,
            )
        ] = one.label
        book.stage("runs").bytes_out += 0 if files is None else files.size

    def turn() -> None:
        nonlocal stages
        stages += len(messages.get_nowait_batch(messages.qsize()))
        tick(stages, len(STAGES) * len(variants))

    for label, (outcome, parcel), facts in session.finished(tasks, turn):
        if parcel is not None:
            unpack(parcel, folder / label)
            book.stage("runs").bytes_back += parcel.size
        book.done("runs", f"{label}: {outcome.summary}", facts)
        outcomes[label] = outcome
    return outcomes


def run_variant(recipe: Recipe, sources: Sources, place: Any, shared: Path | None, messages: Any) -> Any:
    """On a worker: the run of one recipe with sources that were loaded for another one of the sweep."""
    return run_away(recipe, dataclasses.replace(sources, recipe=recipe), place, shared, messages)


def compare_runs(folder: Path, runs: Sequence[Path]) -> Path | None:
    """The page that compares the finished runs, compare.html in the sweep's folder; None for fewer than two."""
    finished = [one for one in runs if (one / "report.json").exists()]
    if len(finished) < 2:
        return None
    compare(finished, folder / "compare.html")
    return folder / "compare.html"
