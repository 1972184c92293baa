"""Stages `ship` and `report`: what is shipped, and the report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

from optin_export import measure, scoring, ship
from optin_export.report import (
    Report,
    Size,
    StageResult,
    chance_warnings,
    compose,
    head_repair,
    output_refit,
    prunings,
    render_html,
    still_deployed,
    still_elsewhere,
    still_spent,
)
from optin_export.report.schema import Pruning, Tried
from optin_export.stages.context import Facts, RunContext
from optin_export.stages.results import MeasureResult
from optin_export.workdir.files import regular, sha256_file, sha256_json, write_text


def write_report(work: RunContext, facts: Facts, stages: Sequence[StageResult]) -> Report:
    """Write report.json and report.html out of what the stages found."""
    operated = facts["surgery"]
    macs, params = (
        Size(base=base, pruned=operated[kind], ratio=operated[kind] / base)
        for kind, base in ((kind, work.costs.whole(kind)) for kind in ("macs", "params"))
    )
    scores = load_file(regular(work.folder / "scores" / "scores.safetensors"))
    judged: MeasureResult = facts["measure"]
    report = compose(
        name=work.recipe.name,
        model={"source": work.recipe.model.source, "task": work.recipe.model.task},
        precision=work.recipe.export.precision,
        gates=judged.gates,
        macs=macs,
        params=params,
        measured=judged.measured,
        pruning=Pruning(
            family=work.structure.family,
            method=_method(work),
            info=facts["scoring"],
            budget=dict(work.plan.budget.items()),
            tried=tuple(Tried(macs=macs, drop=drop) for macs, drop in facts["search"].get("tried", ())),
            compensated=bool(work.recipe.prune.compensate),
            masked_difference=operated["masked_difference"],
            optimality_gap=work.plan.optimality_gap,
            merged=work.plan.merged,
            latency=work.plan.latency,
            groups=prunings(work.structure, work.plan, scores, operated["repairs"]),
            head=head_repair(operated["repairs"]),
            output=output_refit(operated["repairs"]),
            finetuned=operated.get("finetuned"),
        ),
        engines=facts["engines"],
        deployed=still_deployed(work.folder),
        elsewhere=still_elsewhere(work.folder),
        costs=still_spent(work.folder),
        stages=stages,
        warnings=(*chance_warnings(judged.measured), *work.cache.warnings),
        doubts=measure.doubts(judged.measured.latency, macs.ratio, work.recipe.gates.most_other_work),
        environment=work.environment,
    )
    write_text(work.folder / "report.json", report.model_dump_json(indent=2) + "\n")
    work.tick(1, 2)
    write_text(work.folder / "report.html", render_html(report, work.folder))
    ship.add_reports(work.folder)
    work.tick(2, 2)
    return report


def ship_run(work: RunContext, facts: Facts) -> None:
    """A model repository only for a run that passed, and a manifest for every run."""
    judged: MeasureResult = facts["measure"]
    passed = judged.passed
    recipe, repository = work.recipe, work.folder / "triton"
    ship.write_preprocess(work.folder / "preprocess", work.sources.processor, work.sources.names, recipe)
    work.tick(1, 3)
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
    work.tick(2, 3)
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
    work.tick(3, 3)


def _method(work: RunContext) -> str:
    """`prune.score`; of auto also what it took, for which units."""
    score, chosen = work.recipe.prune.score, scoring.methods(work.structure, work.recipe.prune)
    if score != "auto":
        return score
    kinds = {
        method: {one.kind for one in work.structure.groups if chosen[one.key] == method} for method in chosen.values()
    }
    return (
        "auto (" + ", ".join(f"{method} for {' and '.join(sorted(of))}" for method, of in sorted(kinds.items())) + ")"
    )
