"""The interface for notebooks: `prune` makes a torch module smaller with the command line's defaults.

It runs the stages of a normal run in a temporary folder: `options` turns the arguments into a recipe, `pruned` defines
the result. Only `Pruned.save` and `Pruned.to_onnx` write outside that folder.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.numpy import load_file
from torch import nn

from optin_export import measure
from optin_export.api.options import given, prune_fields, recipe_of
from optin_export.api.pruned import Pruned
from optin_export.data import Sources, given_rows, given_sources, usual_sequence
from optin_export.models import as_function, load_given, task_of_module, unwrapped
from optin_export.repair import PrunedModel
from optin_export.scoring import methods
from optin_export.stages import checks, curves, score, search
from optin_export.stages.context import RunContext, Surroundings
from optin_export.stages.results import ScoringResult, SearchResult
from optin_export.units import count_macs, count_params
from optin_export.workdir.files import Scratch

__all__ = ["Pruned", "prune"]


def prune(
    model: nn.Module,
    data: Any,
    *,
    macs: float | None = None,
    params: float | None = None,
    accuracy_drop: float | None = None,
    units: Sequence[str] | None = None,
    score: str = "auto",
    repair: bool | Literal["rescale"] = True,
    tokens: float | Literal["auto", "if-needed"] | Sequence[int] = "if-needed",
    evaluation: Any = None,
    metric: str | None = None,
    tokenizer: Any = None,
    task: str | None = None,
    pooling: str | None = None,
    normalize: bool | None = None,
    sequence: int | None = None,
    samples: int | None = None,
    seed: int = 0,
    **settings: Any,
) -> Pruned:
    """Make a smaller dense copy of a trained model without retraining, as the command line does by default.

    Units are found, scored on unlabelled rows and chosen by measured loss curves under a budget; the remaining weights
    are repaired by least squares. The given model is not changed.

    Args:
        model: a transformers or timm model, or any torch module that takes one tensor and returns one.
        data: calibration rows, a few hundred: a DataLoader or a list of batches, each a tensor [rows, ...], a tuple
            (inputs, labels), or a dictionary such as a tokenizer returns; one tensor or dictionary of all rows; or,
            with `tokenizer`, a list of texts. Labels are dropped.
        macs, params: share of the multiply-accumulates or of the parameters to keep, above 0 and at most 1.
        accuracy_drop: points that may be lost; the search looks for the smallest model that loses no more on half of
            the rows of `evaluation`. Exactly one of the three budgets must be given.
        units: kinds that may be removed: "heads", "neurons", "channels"; None: all kinds that the model has.
        score: the scoring method, as `prune.score` in a recipe.
        repair: the repair method, as `prune.compensate` in a recipe.
        tokens: average share of tokens to keep, "auto", the number merged in each block, or "if-needed": as "auto" for
            images where heads and neurons alone are predicted to lose too much. 1.0: merge none.
        evaluation: labelled rows, in the form of `data`; the report then contains the accuracy before and after.
        metric: the evaluation's metric; None: "accuracy".
        tokenizer: a transformers tokenizer, or its folder, for texts.
        task: as `model.task` in a recipe; None: derived from the model's class, or "image-classification".
        pooling, normalize: how token states become one embedding, as in a recipe; None: their mean.
        sequence: tokens of the longest text, at which MACs are counted. None: the longest row of `data`, 128 for texts.
        samples: number of rows of `data` to read, from the start; None: all.
        seed: random seed for samples and probes.
        settings: other fields of a recipe's section `prune`, such as `allocation`, `align`, `gauss_newton`.

    Returns the pruned model with its plan and its report. Raises InputError for a model, data or options that cannot
    be used, EnvironmentLacks for a missing package.
    """
    model = unwrapped(model)
    if task is None:
        task = task_of_module(model, reads_text=tokenizer is not None)
    budget = {"macs": macs, "params": params, "accuracy_drop": accuracy_drop}
    said = {"task": task, "pooling": pooling, "normalize": normalize}
    said |= {"tokenizer": str(tokenizer)} if isinstance(tokenizer, str | Path) else {}
    section = {"units": units, "score": score, "compensate": repair, **prune_fields(settings)}
    recipe = recipe_of(
        said, {**section, "budget": given(budget)}, tokens, sequence, seed, evaluation is not None, metric
    )
    with _own_state(seed):
        calibration = given_rows(data, recipe.model.task, model, samples)
        if sequence is None and recipe.is_text:
            export = recipe.export.model_copy(update={"sequence": usual_sequence(calibration, model)})
            recipe = recipe.model_copy(update={"export": export})
        judged = None
        if evaluation is not None:
            judged = given_rows(evaluation, recipe.model.task, model, None, "the evaluation data", labelled=True)
        loaded = load_given(model, recipe.model)
        reader = None if "tokenizer" in said else tokenizer
        return _pruned(given_sources(recipe, loaded, calibration, judged, reader))


@contextlib.contextmanager
def _own_state(seed: int) -> Iterator[None]:
    """Give torch the state in which the command line runs; restore the caller's state on exit."""
    elsewhere = torch.get_default_device().type != "cpu"
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.device("cpu") if elsewhere else contextlib.nullcontext())
        torch.default_generator.manual_seed(seed)
        yield


def _pruned(sources: Sources) -> Pruned:
    """Run the stages up to the repair on a model and data in memory."""
    recipe = sources.recipe
    with contextlib.closing(Scratch()) as scratch:
        around = Surroundings(sources=sources)
        work = RunContext(recipe, scratch.path, False, around=around)
        for check in (checks.sources_load, checks.units_are_there, checks.budget_is_reachable):
            check(work)
        scored = score.score(work)
        scores = load_file(scored.path)
        found = search.find_plan(work, scored, curves.measure_curves(work, scored))
        done = work.operation(found.plan)
    for note in work.cache.warnings:
        warnings.warn(note, stacklevel=3)
    return Pruned(
        done.dense.requires_grad_(True).model,
        found.plan,
        scores,
        _report(work, done, scored, found),
        done.dense,
        sources.fixed(2),
        sources.loaded.architecture,
        work.structure,
        recipe.export.sequence if recipe.is_text and not recipe.tokens.merges else None,
    )


def _report(work: RunContext, done: PrunedModel, scored: ScoringResult, found: SearchResult) -> dict[str, Any]:
    sources, plan = work.sources, found.plan
    sizes = {"macs": count_macs(done.dense, sources.fixed(1)), "params": count_params(done.dense)}
    whole = {"macs": plan.base.macs, "params": plan.base.params}
    report: dict[str, Any] = {
        name: {"base": whole[name], "pruned": size, "ratio": size / whole[name]} for name, size in sizes.items()
    }
    report["groups"] = {
        group.key: {
            "block": work.structure.blocks[group.block].removeprefix("model."),
            "kind": f"{group.kind}{group.part}",
            "count": group.count,
            "kept": len(plan.groups[group.key].kept),
        }
        for group in work.structure.groups
    }
    log = {name: [list(pair) for pair in pairs] for name, pairs in vars(found.log).items() if pairs}
    report["score"] = {"methods": methods(work.structure, work.recipe.prune), **scored.info, **log}
    report["repair"] = done.to_json()
    data = sources.evaluation()
    if data is not None:
        base, pruned = (measure.predict(as_function(one), data) for one in (sources.model, done.dense))
        report["accuracy"] = measure.evaluate(base, pruned, data.metric, work.recipe.seed).to_json()
    report["notes"] = list(work.cache.warnings)
    return report
