"""Stage `engines`: build engines of both models for every target."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

from optin_export import engines
from optin_export.progress import reporter, reporting
from optin_export.recipe import Target, model_of, precision_of
from optin_export.report.schema import EngineResult
from optin_export.stages.context import RunContext
from optin_export.stages.results import BuildResult, EngineBuild
from optin_export.workdir.onnx_files import sha256_graph

#: Progress steps of one engine's build.
PARTS = 100


def build_engines(work: RunContext) -> BuildResult:
    """Build both models, in every precision, for every target; results state why an engine cannot run here, if so."""
    built: list[EngineResult] = []
    total, show = len(work.recipe.here) * len(work.engine_names), reporter()

    def share(step: int, steps: int) -> None:
        """Scale a builder's own steps to the engine's share of the stage."""
        show(len(built) * PARTS + PARTS * step // max(steps, 1), total * PARTS)

    for target in work.recipe.here:
        with work.attempt(target):
            for which in work.engine_names:
                built.append(_build(work, target, which, share))
                share(0, 1)
    return BuildResult(tuple(built))


def _build(work: RunContext, target: Target, which: str, share: Callable[[int, int], None]) -> EngineResult:
    path = engines.artefact(work.folder, target, which)
    source = engines.source_of(work.folder, target, which)

    def run() -> EngineBuild:
        start = time.perf_counter()
        with reporting(share):
            properties = engines.build(source, target, path, work.sources.shapes())
        return EngineBuild(round(time.perf_counter() - start, 3), properties)

    inputs = {
        "source": sha256_graph(source),
        "target": target.model_dump(),
        "versions": engines.versions(target),
        "shapes": work.sources.shapes(),
        "cpu": work.environment["cpu"],
    }
    written = partial(engines.files, path, target)
    result = work.cache.step("engines", f"engines.{target.name}.{which}", inputs, written, run, EngineBuild)
    named = {"target": target.name, "model": model_of(which), "precision": precision_of(which)}
    return EngineResult(**named, **vars(result), unmeasured=engines.unavailable(target))
