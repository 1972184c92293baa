"""Turn the options of `prune` into a validated recipe for a model and rows in memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from optin_export.errors import InputError
from optin_export.recipe import METRICS, Recipe, validate

#: The source of the model and the rows in that recipe.
IN_MEMORY = "py:memory:given"
#: Tasks whose labels are one class, or one number, per row.
JUDGED = ("text-classification", "image-classification", "audio-classification")


def recipe_of(
    model: dict[str, Any],
    section: Mapping[str, Any],
    tokens: Any,
    sequence: int | None,
    seed: int,
    evaluated: bool,
    metric: str | None,
) -> Recipe:
    """The options as a validated recipe, whose model and data are in memory. Raises InputError that names the field."""
    task = model["task"]
    if evaluated and task not in JUDGED:
        raise InputError(
            f"prune() cannot evaluate a model for {task}",
            f"it reads one label per row, as for {' and '.join(JUDGED)}",
            "leave evaluation out, or run a recipe with data.evaluation (optin_export.run)",
        )
    data: dict[str, Any] = {"calibration": {"source": IN_MEMORY}}
    if evaluated:
        data["evaluation"] = {"source": IN_MEMORY, "metric": metric or METRICS[task][0]}
    raw = {
        "recipe": 1,
        "name": "prune",
        "seed": seed,
        "model": {"source": IN_MEMORY, **given(model)},
        "data": data,
        "prune": given(section),
        "tokens": {"schedule": tokens} if isinstance(tokens, list | tuple) else {"keep": tokens},
        "export": given({"sequence": sequence}),
    }
    try:
        return validate(raw, Path.cwd())
    except InputError as error:
        raise InputError("prune() cannot take these options", error.why, "correct what is named above") from None


def prune_fields(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """Further fields of `prune`; fields that have another name here, or need an engine, are refused."""
    for name in ("speedup", "latency_ms"):
        if name in settings:
            raise InputError(
                f"prune() has no budget {name}",
                "latency is that of an engine on the machine that serves, and prune() builds none",
                f"run a recipe with prune.budget.{name} (optin_export.run), or give macs, params or accuracy_drop",
            )
    renamed = {"compensate": "repair", "budget": "macs, params or accuracy_drop"}
    wrong = next((name for name in settings if name in renamed), None)
    if wrong is not None:
        raise InputError(f"prune() has no option '{wrong}'", "it has another name here", f"set {renamed[wrong]}")
    return settings


def given(values: Mapping[str, Any]) -> dict[str, Any]:
    """The options without those that are None."""
    return {name: value for name, value in values.items() if value is not None}
