"""Stage `scoring`: the scores, and the loss curves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.numpy import load_file, save_file

from optin_export import repair, scoring
from optin_export.stages.context import RunContext
from optin_export.stages.results import ScoringResult
from optin_export.workdir.cache import computed_by
from optin_export.workdir.files import atomic_path, regular, sha256_file, sha256_json


def score(work: RunContext) -> ScoringResult:
    """Score all units into scores/, and measure the loss curves."""
    prune, path = work.recipe.prune, work.folder / "scores" / "scores.safetensors"
    later = {"budget", "allocation", "compensate", "gauss_newton", "align", "curve_samples", "rounds"}
    wanted = prune.model_dump(mode="json", exclude=later)

    def run() -> dict[str, float]:
        sources = work.sources
        key = sha256_json({"inputs": inputs, **computed_by("scoring")})
        scores = scoring.score(
            sources.model,
            work.structure,
            sources.scoring,
            prune,
            work.recipe.seed,
            work.tick,
            work.around.spread(key),
            work.placement,
        )
        with atomic_path(path) as temporary:
            save_file(dict(sorted(scores.values.items())), temporary)
        return scores.info

    inputs = {
        **work.calibration_digest,
        "prune": wanted,
        "methods": scoring.methods(work.structure, prune),
        "seed": work.recipe.seed,
    }
    info = work.cache.step("scoring", "scoring", inputs, [path], run, dict[str, float])
    if prune.allocation == "joint":
        _measure_curves(work, path)
    return ScoringResult(path, info)


def _measure_curves(work: RunContext, scores: Path) -> None:
    """What keeping k units of each group costs, for the search; made with the repair's means, so by `surgery`."""
    path, prune = work.folder / "scores" / "curves.safetensors", work.recipe.prune

    def run() -> dict[str, Any]:
        sources, weights = work.sources, work.sensitivities if prune.compensate else None
        with work.placement(sources.model):
            curves = repair.loss_curves(
                sources.model,
                work.structure,
                load_file(regular(scores)),
                sources.calibration,
                sources.curves,
                least=work.least,
                temperature=prune.temperature,
                repair=prune.compensate,
                weights=weights,
                seed=work.recipe.seed,
                tick=work.tick,
            )
        with atomic_path(path) as temporary:
            save_file(dict(sorted(curves.items())), temporary)
        return {}

    inputs = {
        **work.calibration_digest,
        "scores": sha256_file(scores),
        "temperature": prune.temperature,
        "compensate": prune.compensate,
        "curve_samples": prune.curve_samples,
        "seed": work.recipe.seed,
    }
    work.cache.step("repair", "scoring.curves", inputs, [path], run)
