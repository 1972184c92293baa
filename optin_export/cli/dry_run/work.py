"""Describe what each stage of a run would do, from the recipe alone."""

from __future__ import annotations

from pathlib import Path

from optin_export.recipe import Recipe


def planned_work(recipe: Recipe, folder: Path) -> list[tuple[str, str]]:
    """(name of a stage, what it would do), in order."""
    model, data, prune, export = recipe.model, recipe.data, recipe.prune, recipe.export
    tuned = recipe.tuning
    shapes = ", ".join(f"{batch}x{export.sequence}" if recipe.is_text else str(batch) for batch in export.batch)
    targets = ", ".join(target.name for target in recipe.targets)
    rows = data.calibration.samples or "all"
    metric = data.evaluation.metric if data.evaluation else "no accuracy"
    repository = "a Triton model repository if all gates pass, and " if recipe.ship.triton else ""
    return [
        ("sources", f"load {model.source} ({model.task}) and {rows} calibration rows from {data.calibration.source}"),
        ("scoring", f"score {' and '.join(prune.group_kinds)} with {prune.score}" + _effort(recipe)),
        (
            "curves",
            "measure loss curves of all groups" if prune.allocation == "joint" else "nothing, the scores decide",
        ),
        ("search", _search(recipe)),
        (
            "surgery",
            "rebuild the model without the pruned units"
            + _merging(recipe)
            + (", then repair by least squares" if prune.compensate else ", without repair")
            + (" and Gauss-Newton" if prune.gauss_newton is True else "")
            + (f", then fine-tune ({tuned.source or f'{tuned.steps} steps'})" if tuned is not None else ""),
        ),
        ("export", f"write onnx/base.onnx and onnx/pruned.onnx in {export.precision}, batch up to {max(export.batch)}"),
        ("engines", f"build engines of both for {targets}"),
        ("measure", f"measure parity, latency at batch {shapes}, {metric}"),
        ("ship", f"write {repository}manifest.json"),
        ("report", f"write report.json and report.html in {folder}; gates: {_gates(recipe)}"),
    ]


def _search(recipe: Recipe) -> str:
    budget, multiples = recipe.budget, f", in multiples of {recipe.alignment.features}: {recipe.alignment.reason}"
    value = "minimise the measured loss" if recipe.prune.allocation == "joint" else "keep the highest scores"
    if budget.accuracy_drop is not None:
        return f"{value}, in the smallest model that loses at most {budget.accuracy_drop:g} points{multiples}"
    if budget.kind == "latency":
        limit = f"{budget.speedup:g}x the speed" if budget.speedup is not None else f"{budget.latency_ms:g} ms a call"
        return (
            f"measure a latency table on {budget.target} at batch {budget.batch}, {value} within {limit} by it, "
            f"build and measure that engine, correct the table and repeat (3 rounds at most){multiples}"
        )
    return f"{value} within {budget.fraction:.0%} of the {budget.kind}{multiples}"


def _merging(recipe: Recipe) -> str:
    tokens = recipe.tokens
    if not tokens.merges:
        return ""
    if tokens.schedule is not None:
        return f", merge {'+'.join(map(str, tokens.schedule))} tokens"
    return ", merge tokens" + ("" if tokens.keep == "auto" else f" to {tokens.keep:.0%} on average")


def _effort(recipe: Recipe) -> str:
    prune = recipe.prune
    return f" ({prune.probes} probes, {prune.score_samples} rows)" if prune.score in ("auto", "optin") else ""


def _gates(recipe: Recipe) -> str:
    gates = recipe.gates
    named = [f"speedup >= {gates.speedup:g}"] if gates.speedup is not None else []
    named += [f"accuracy drop <= {gates.accuracy_drop:g} points"] if gates.accuracy_drop is not None else []
    return ", ".join(["parity", "budget", *named])
