"""Stage `ship`: write the model repository and the manifest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from optin_export import ship
from optin_export.progress import advance, task
from optin_export.stages.context import RunContext
from optin_export.stages.results import MeasureResult
from optin_export.workdir.files import sha256_file, sha256_json


@task(3)
def ship_run(work: RunContext, judged: MeasureResult) -> None:
    """Write a model repository for a run that passed, and a manifest for every run."""
    passed = judged.passed
    recipe, repository = work.recipe, work.folder / "triton"
    ship.write_preprocess(work.folder / "preprocess", work.sources.processor, work.sources.names, recipe)
    advance()
    if passed and recipe.ship.triton:
        origin = ship.Origin(work.folder, recipe, passed, ship.summary_of(judged.gates), work.environment, work.digest)
        written: list[Path] = []

        def run() -> dict[str, Any]:
            ship.ship_models(origin, repository, replace=True)
            written.extend(path for path in sorted(repository.rglob("*")) if path.is_file())
            return {}

        read = {path.relative_to(work.folder).as_posix(): sha256_file(path) for path in ship.files_of(origin)}
        inputs = {"files": read, "recipe": recipe.model_dump(mode="json"), "environment": work.environment}
        work.cache.step("ship", "ship.triton", inputs, written, run)
    else:
        ship.remove(repository)
    advance()
    ship.write_manifest(
        work.folder,
        {
            "recipe": sha256_json(recipe.model_dump(mode="json")),
            "model": recipe.model.source,
            "inputs": work.digest,
            "seed": recipe.seed,
            "passed": passed,
            "environment": work.environment,
        },
    )
    advance()
