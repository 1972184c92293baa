"""Stage `curves`: the loss of removing units of one group after repair, which the search adds up."""

from __future__ import annotations

from typing import Any

from safetensors.numpy import load_file, save_file

from optin_export import repair
from optin_export.stages.context import RunContext
from optin_export.stages.results import CurvesResult, ScoringResult
from optin_export.workdir.files import atomic_path, regular, sha256_file


def measure_curves(work: RunContext, scores: ScoringResult) -> CurvesResult:
    """Measure the loss of keeping k units of each group, for several k, into scores/; not if only scores decide."""
    path, prune = work.folder / "scores" / "curves.safetensors", work.recipe.prune
    if prune.allocation != "joint":
        return CurvesResult(None)
    if note := work.sources.curves_note:
        work.cache.warn(note)

    def run() -> dict[str, Any]:
        sources, weights = work.sources, work.sensitivities if prune.compensate else None
        with work.placement(sources.model):
            curves = repair.loss_curves(
                sources.model,
                work.structure,
                load_file(regular(scores.path)),
                sources.calibration,
                sources.curves,
                work.repair_settings,
                least=work.least,
                weights=weights,
            )
        with atomic_path(path) as temporary:
            save_file(dict(sorted(curves.items())), temporary)
        return {}

    inputs = {
        **work.calibration_digest,
        "scores": sha256_file(scores.path),
        "temperature": prune.temperature,
        "compensate": prune.compensate,
        "curve_samples": prune.curve_samples,
        "seed": work.recipe.seed,
    }
    work.cache.step("repair", "curves", inputs, [path], run)
    return CurvesResult(path)
