"""Stages `sources` and `scoring`: what can be checked at once, the scores, and the loss curves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.numpy import load_file, save_file

from optin_export import engines, scoring, search, ship, surgery
from optin_export.errors import EnvironmentLacks
from optin_export.files import atomic_path, sha256_file, sha256_json, write_text
from optin_export.ledger import code_hash
from optin_export.workspace import Facts, Workspace


def load(work: Workspace, facts: Facts) -> None:
    """Load and check everything that can be checked before hours of work and before anything is written."""
    for target in work.recipe.here:
        engines.versions(target)
    work.tick(1, 4)
    for text in work.sources.warnings:  # loaded now, because all that follows needs the model and the data
        work.ledger.warn(text)
    work.placement.check(work.sources.model, work.sources.fixed(1))
    work.tick(2, 4)
    if work.recipe.ship.triton:
        ship.check_tools()
    search.check_budget(work.costs, work.recipe.prune.budget, work.least)
    work.tick(3, 4)
    if work.recipe.prune.budget.kind == "latency":
        _check_latency_budget(work)
    write_text(work.folder / "recipe.yaml", work.recipe.to_yaml())
    work.tick(4, 4)


def _check_latency_budget(work: Workspace) -> None:
    """The target's clock has to run here, and the model has to have a latency table."""
    target = work.recipe.budget_target
    reason = engines.unavailable(target)
    if reason is not None:
        raise EnvironmentLacks(
            f"a latency budget cannot be searched on {target.name}",
            reason,
            "run on a machine that has it, name another target in prune.budget.target, or set prune.budget.macs",
        )
    search.signatures(work.structure, work.costs)


def score(work: Workspace, facts: Facts) -> dict[str, Any]:
    """Score all units into scores/, and measure the loss curves; returns facts about the scores."""
    prune, path = work.recipe.prune, work.folder / "scores" / "scores.safetensors"
    later = {"budget", "allocation", "compensate", "gauss_newton", "align", "curve_samples", "rounds"}
    wanted = prune.model_dump(mode="json", exclude=later)

    def run() -> dict[str, Any]:
        sources = work.sources
        key = sha256_json({"inputs": inputs, "code": code_hash("scoring")})
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
    info = work.ledger.step("scoring", "scoring", inputs, [path], run)
    if prune.allocation == "joint":
        _measure_curves(work, path)
    return info


def _measure_curves(work: Workspace, scores: Path) -> None:
    """What keeping k units of each group costs, for the search; made with the repair's means, so by `surgery`."""
    path, prune = work.folder / "scores" / "curves.safetensors", work.recipe.prune

    def run() -> dict[str, Any]:
        sources, weights = work.sources, work.sensitivities
        with work.placement(sources.model):
            curves = surgery.loss_curves(
                sources.model,
                work.structure,
                load_file(scores),
                sources.calibration,
                sources.curves,
                least=work.least,
                temperature=prune.temperature,
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
        "curve_samples": prune.curve_samples,
        "seed": work.recipe.seed,
    }
    work.ledger.step("surgery", "scoring.curves", inputs, [path], run)
