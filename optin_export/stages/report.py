"""Stage `report`: write report.json and report.html from the stages' results."""

from __future__ import annotations

from collections.abc import Sequence

from safetensors.numpy import load_file

from optin_export import measure, scoring, ship
from optin_export.progress import advance, task
from optin_export.report import (
    Report,
    Size,
    StageResult,
    chance_warnings,
    head_repair,
    output_refit,
    prunings,
    render_html,
    still_deployed,
    still_elsewhere,
    still_spent,
)
from optin_export.report.compose import compose
from optin_export.report.schema import FineTuned, Pruning, Tried
from optin_export.stages.context import RunContext
from optin_export.stages.results import BuildResult, MeasureResult, PruneResult, ScoringResult, SearchResult
from optin_export.workdir.files import regular, write_text


def write_report(
    work: RunContext,
    scores: ScoringResult,
    found: SearchResult,
    pruned: PruneResult,
    built: BuildResult,
    judged: MeasureResult,
    stages: Sequence[StageResult],
) -> Report:
    """Write report.json and report.html from the stages' results."""
    plan, tuned = found.plan, pruned.finetuned
    macs, params = (
        Size(base=base, pruned=count, ratio=count / base)
        for base, count in ((work.costs.whole("macs"), pruned.macs), (work.costs.whole("params"), pruned.params))
    )
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
            info=scores.info,
            budget=dict(plan.budget.items()),
            tried=tuple(Tried(macs=macs, drop=drop) for macs, drop in found.log.tried),
            compensated=bool(work.recipe.prune.compensate),
            masked_difference=pruned.masked_difference,
            optimality_gap=plan.optimality_gap,
            merged=plan.merged,
            latency=plan.latency,
            trial=plan.trial,
            alignment=plan.alignment,
            groups=prunings(work.structure, plan, load_file(regular(scores.path)), pruned.repairs),
            head=head_repair(pruned.repairs),
            output=output_refit(pruned.repairs),
            finetuned=None if tuned is None else FineTuned(**tuned.to_json()),
        ),
        engines=built.engines,
        candidates=judged.candidates,
        deployed=still_deployed(work.folder),
        elsewhere=still_elsewhere(work.folder),
        costs=still_spent(work.folder),
        stages=stages,
        warnings=(*chance_warnings(judged.measured), *work.cache.warnings),
        doubts=measure.doubts(judged.measured.latency, macs.ratio, work.recipe.gates.most_other_work),
        environment=work.environment,
    )
    with task(2):
        write_text(work.folder / "report.json", report.model_dump_json(indent=2) + "\n")
        advance()
        write_text(work.folder / "report.html", render_html(report, work.folder))
        ship.add_reports(work.folder)
        advance()
    return report


def _method(work: RunContext) -> str:
    """`prune.score`; for auto, also the chosen methods and their units."""
    score, chosen = work.recipe.prune.score, scoring.methods(work.structure, work.recipe.prune)
    if score != "auto":
        return score
    kinds = {
        method: {one.kind for one in work.structure.groups if chosen[one.key] == method} for method in chosen.values()
    }
    return (
        "auto (" + ", ".join(f"{method} for {' and '.join(sorted(of))}" for method, of in sorted(kinds.items())) + ")"
    )
