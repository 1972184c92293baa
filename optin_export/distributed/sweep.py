"""A sweep on a cluster: scoring here with the workers' help, then everything else in parallel, one worker per run."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optin_export.data import Sources
from optin_export.distributed import target_nodes
from optin_export.distributed.costs import Book
from optin_export.distributed.file_transfer import pack, unpack
from optin_export.distributed.remote_tasks import run_on_worker
from optin_export.distributed.scoring import spread_over
from optin_export.errors import InputError
from optin_export.progress import report, reporting
from optin_export.recipe import Recipe, Variant, expand
from optin_export.stages.pipeline import run
from optin_export.stages.sweep import SHARED, Outcomes, Sweep, failed, outcome_of
from optin_export.workdir.run_directory import STAGES

if TYPE_CHECKING:
    from optin_export.distributed.ray_session import Session

#: The last stage that runs here, once for all runs that share it.
COMMON = "curves"


def run_on_workers(session: Session, sweep: Sweep) -> Outcomes:
    """Execute the runs; returns how each ended. Raises InputError at the start for files that workers may not have."""
    folder, book = sweep.folder, Book(sweep.folder)
    sweep = dataclasses.replace(
        sweep, spread=lambda recipe, key: spread_over(session, folder, key, book, gpus=recipe.model.gpus)
    )
    here = sweep.options.stop_after in STAGES[: STAGES.index(COMMON) + 1]
    outcomes = {one.label: sweep.run(one, sweep.options.stop_after if here else COMMON) for one in sweep.variants}
    if not here:
        waiting = [one for one in sweep.variants if outcomes[one.label].exit_code == 0]
        sweep.display.start("runs")
        with reporting(sweep.display.tick):
            outcomes |= _fan_out(session, sweep, waiting, book)
        for one in waiting:
            place = folder / one.label
            if one.recipe.fleet and (place / "report.json").exists():
                with reporting(sweep.display.tick):
                    target_nodes.measure_fleet(
                        session, one.recipe, place, book, sweep.options.force or sweep.options.redo is not None
                    )
                outcomes[one.label] = outcome_of(run(one.recipe, place, around=sweep.around(one)))
    book.save()
    return outcomes


def check_paths(recipe: Recipe, session: Session) -> None:
    """Raise InputError if a run of the sweep reads files by their path, which workers may not have."""
    if not session.shared_files:
        for one in expand(recipe):
            _refuse_paths(one.recipe)


def _refuse_paths(recipe: Recipe) -> None:
    """Refuse paths: a whole run reads these files on its node. Scoring does not: it receives the model and batches."""
    data, tune = recipe.data, recipe.finetune
    rows = [data.calibration, data.evaluation, None if tune is None else tune.data]
    code = [recipe.model.source, None if tune is None else tune.source]
    by_path = [one for one in code if one is not None and one.startswith("py:") and ".py:" in one.removeprefix("py:")]
    by_path += [one.source for one in rows if one is not None and one.source.startswith(("images:", "wav:"))]
    if by_path:
        raise InputError(
            "a sweep on this cluster cannot use the recipe's files",
            f"'{by_path[0]}' is read by its path, which other nodes may not have",
            "put it on a file system that all nodes see and add --shared-files, or use --cluster local",
        )


def _fan_out(
    session: Session,
    sweep: Sweep,
    variants: Sequence[Variant],
    book: Book,
) -> Outcomes:
    """Run everything after the scoring for all runs in parallel, one worker each, with the GPUs of its recipe."""
    from optin_export.distributed.ray_session import no_gpus

    folder, loaded = sweep.folder, sweep.loaded
    messages, stages = session.messages(), 0
    tasks, references = {}, {}
    outcomes: Outcomes = {}
    for one in variants:
        gpus = max(one.recipe.model.gpus, int(any(target.device == "cuda" for target in one.recipe.here)))
        if gpus and session.missing({"GPU": gpus}):
            outcomes[one.label] = failed(no_gpus(gpus))  # and does not wait forever
            continue
        place, shared = folder / one.label, folder / SHARED
        files = None if session.shared_files else pack(place, [p for p in place.rglob("*") if p.is_file()])
        sources = loaded.of(one.recipe)
        known = id(sources.loaded)
        if known not in references:
            # One reference to the model for all runs that share it; separate references would send it several times.
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
        report(stages, len(STAGES) * len(variants))

    for label, (outcome, packed), facts in session.finished(tasks, turn):
        if packed is not None:
            unpack(packed, folder / label)
            book.stage("runs").bytes_back += packed.size
        book.done("runs", f"{label}: {outcome.summary}", facts)
        outcomes[label] = outcome
    return outcomes


def run_variant(recipe: Recipe, sources: Sources, place: Any, shared: Path | None, messages: Any) -> Any:
    """On a worker: run one recipe with sources that were loaded for another recipe of the sweep."""
    return run_on_worker(recipe, dataclasses.replace(sources, recipe=recipe), place, shared, messages)
