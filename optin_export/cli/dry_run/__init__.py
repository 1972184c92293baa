"""`--dry-run`: what each stage of a run would do, how long it takes, and how much memory and disk it needs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from optin_export.recipe import Recipe, expand

__all__ = ["print_dry_run"]


def print_dry_run(recipe: Recipe, folder: Path, as_json: bool) -> int:
    """Check the recipe as the start of a run does, and print the plan of work.

    Args:
        recipe: a recipe, or a sweep, whose first run is shown.
        folder: the run folder.
        as_json: print one JSON document instead of text.

    Returns:
        The exit code.

    Raises:
        OptinError: a run would stop at its start with this error.
    """
    from optin_export.cli.dry_run.cost import estimate_cost
    from optin_export.cli.dry_run.work import planned_work

    # This import loads torch.
    from optin_export.stages.forecast import forecast_of
    from optin_export.stages.preflight import Known, preflight

    variants = expand(recipe)
    known = Known()
    checked = [preflight(one, known) for one in ([one.recipe for one in variants] or [recipe])]
    wrong = next((one.wrong for one in checked if one.wrong is not None), None)
    if wrong is not None:
        raise wrong
    refusal = next((one.refusal for one in checked if one.refusal is not None), None)
    shown, place = (variants[0].recipe, folder / variants[0].label) if variants else (recipe, folder)
    forecast = None if refusal is not None or checked[0].not_checked else forecast_of(shown)
    cost, findings = estimate_cost(shown, place, forecast), checked[0].findings
    stages = list(zip(planned_work(shown, place), cost.stages, strict=True))
    if as_json:
        document: dict[str, Any] = {"name": recipe.name}
        if variants:
            document["sweep"] = [one.label for one in variants]
        if refusal is not None:
            document["error"] = refusal.to_json()
        document["stages"] = [{"name": name, "work": work, "estimate": one.to_json()} for (name, work), one in stages]
        document["checks"] = [finding.to_json() for finding in findings]
        print(json.dumps(document | cost.to_json()))
        return 0 if refusal is None else refusal.exit_code
    if variants:
        print(f"{recipe.name}: a sweep of {len(variants)} runs in {folder}; this is the first of them")
        print("\n".join(f"  {one.label}" for one in variants))
    limit = " as far as it could be checked (see the end)" if checked[0].not_checked or refusal else ""
    print(f"{shown.name}: the recipe is valid{limit}; a run in {place} would")
    print("\n".join(f"  {name:<8} {work}\n{'':<11}{one}" for (name, work), one in stages))
    print("\n".join(filter(None, (cost.total, cost.summary()))))
    print("\n".join(str(finding) for finding in findings if finding.state != "refused"))
    if refusal is not None:
        raise refusal
    return 0
