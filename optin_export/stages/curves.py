"""Stage `curves`: the loss of removing units of one group after repair, which the search adds up."""

from __future__ import annotations

from typing import Any

from safetensors.numpy import load_file, save_file

from optin_export import repair
from optin_export.data import Sources
from optin_export.stages.context import RunContext
from optin_export.stages.results import CurvesResult, ScoringResult
from optin_export.workdir.files import atomic_path, regular, sha256_file


def measure_curves(work: RunContext, scores: ScoringResult) -> CurvesResult:
    """Measure the loss of keeping k units of each group, for several k, into scores/; not if only scores decide."""
    path, prune = work.folder / "scores" / "curves.safetensors", work.recipe.prune
    if prune.allocation != "joint":
        return CurvesResult(None)
    if note := rows_note(work.sources):
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
        "autocast": prune.autocast,
        "dimensions": [one.name for one in work.structure.attentions],
        "seed": work.recipe.seed,
    }
    work.cache.step("repair", "curves", inputs, [path], run)
    return CurvesResult(path)


def rows_note(sources: Sources) -> str | None:
    """Why the loss curves are judged on other rows than the recipe asks for; None if they are not."""
    every, judged = sources.calibration, sum(len(batch.rows) for batch in sources.curves)
    if len(every) == 1:
        return (
            "all calibration rows fit into one batch, so the loss curves are judged on the rows that the repair is "
            "fitted to, and look better than they are: give more rows (data.calibration.samples)"
        )
    asked, size = sources.recipe.prune.curve_samples, len(every[0].rows)
    if "curve_samples" in sources.recipe.prune.model_fields_set and 2 * abs(judged - asked) > size:
        return (
            f"the loss curves are judged on {judged} rows, not on prune.curve_samples: {asked}, because they take "
            f"whole batches of {size} and at most a third of the {len(sources.calibration_examples)} calibration rows"
        )
    return None
