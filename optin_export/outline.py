"""`--dry-run`: what a run would do, from the recipe alone. Loads no torch, touches nothing."""

from __future__ import annotations

from pathlib import Path

from optin_export.errors import InputError
from optin_export.recipe import Recipe
from optin_export.sentence import transformer_folder


def outline(recipe: Recipe, folder: Path) -> list[tuple[str, str]]:
    """(stage, what it would do) in order. Raises InputError for a file the recipe names that is not there."""
    check_files(recipe)
    model, data, prune, export = recipe.model, recipe.data, recipe.prune, recipe.export
    tuned = recipe.finetune
    shapes = ", ".join(f"{batch}x{export.sequence}" if recipe.is_text else str(batch) for batch in export.batch)
    targets = ", ".join(target.name for target in recipe.targets)
    rows = data.calibration.samples or "all"
    evaluation = data.evaluation
    return [
        ("sources", f"load {model.source} ({model.task}), {rows} calibration rows of {data.calibration.source}"),
        ("scoring", f"score {' and '.join(prune.units)} by {prune.score}" + _effort(recipe)),
        ("search", _search(recipe)),
        (
            "surgery",
            "rebuild densely"
            + _merging(recipe)
            + (", then repair by least squares" if prune.compensate else ", no repair")
            + (" and Gauss-Newton" if prune.gauss_newton is True else "")
            + (f", then fine-tune ({tuned.source or f'{tuned.steps} steps'})" if tuned is not None else ""),
        ),
        ("export", f"onnx/base.onnx and onnx/pruned.onnx in {export.precision}, batch up to {max(export.batch)}"),
        ("engines", f"build both for {targets}"),
        (
            "measure",
            f"parity, latency at batch {shapes}" + (f", {evaluation.metric}" if evaluation else ", no accuracy"),
        ),
        ("ship", ("Triton model repository if all gates pass, and " if recipe.ship.triton else "") + "manifest.json"),
        ("report", f"report.json and report.html in {folder}; gates: {_gates(recipe)}"),
    ]


def check_files(recipe: Recipe) -> None:
    """Raises InputError for a file the recipe names that is not there."""
    model, data, tuned = recipe.model, recipe.data, recipe.finetune
    for source in (data.calibration, data.evaluation, None if tuned is None else tuned.data):
        if source is not None:
            _check_file(source.source)
    _check_file(model.source)
    if tuned is not None and tuned.source is not None:
        _check_file(tuned.source)
    if model.weights not in ("pretrained", "random") and not Path(model.weights).is_file():
        raise InputError(f"cannot read the checkpoint {model.weights}", "no such file", "correct model.weights")
    if model.source.startswith("/") and not (transformer_folder(Path(model.source)) / "config.json").is_file():
        raise InputError(
            f"cannot load a model from {model.source}", "no folder with a config.json", "correct model.source"
        )


def _search(recipe: Recipe) -> str:
    budget = recipe.prune.budget
    value = "lose the least (measured per sub-layer)" if recipe.prune.allocation == "joint" else "keep the most score"
    if budget.accuracy_drop is not None:
        return f"{value} in the smallest model that loses at most {budget.accuracy_drop:g} points"
    if budget.kind == "latency":
        limit = f"{budget.speedup:g}x the speed" if budget.speedup is not None else f"{budget.latency_ms:g} ms a call"
        clock = recipe.budget
        return (
            f"measure a latency table on {clock.target} at batch {clock.batch}, {value} within {limit} by it, "
            "build and measure that engine, correct and repeat (3 rounds at most)"
        )
    return f"{value} within {budget.fraction:.0%} of the {budget.kind}"


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


def _check_file(source: str) -> None:
    prefix, _, path = source.partition(":")
    if prefix == "py":
        path = path.rpartition(":")[0]
    if prefix in ("csv", "tsv", "npz") or (prefix == "py" and path.endswith(".py")):
        found, kind = Path(path).is_file(), "file"
    else:
        found, kind = prefix != "images" or Path(path).is_dir(), "folder"
    if not found:
        raise InputError(f"cannot read {source}", f"no such {kind}", "check the path (relative to the recipe)")
