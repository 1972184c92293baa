"""Stage `scoring`: one importance score per unit."""

from __future__ import annotations

from safetensors.numpy import save_file

from optin_export import scoring
from optin_export.stages.context import RunContext
from optin_export.stages.results import ScoringResult
from optin_export.workdir.cache import computed_by
from optin_export.workdir.files import atomic_path, sha256_json


def score(work: RunContext) -> ScoringResult:
    """Score all units into scores/."""
    prune, path = work.recipe.prune, work.folder / "scores" / "scores.safetensors"
    later = {"budget", "allocation", "compensate", "gauss_newton", "align", "curve_samples"}
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
    return ScoringResult(path, info)
