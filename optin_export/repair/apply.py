"""Apply a plan to a model: rebuild it as a smaller dense model, check it against the masked original, repair it."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from optin_export.data import Batch
from optin_export.errors import InputError
from optin_export.models import Inputs, TaskModel
from optin_export.objective import Reference
from optin_export.pruning import insert_merging, narrow, rebuild
from optin_export.repair.gauss_newton import OUTPUT, outputs_of, refine
from optin_export.repair.sensitivity import Weights
from optin_export.repair.sequential import AtWork, Repair, compensate
from optin_export.repair.settings import RepairSettings
from optin_export.search import Plan
from optin_export.units import Structure, find_tokens, masked


@dataclass(frozen=True)
class PrunedModel:
    """The dense model, its difference from the masked original before compensation, and the repair per group."""

    dense: TaskModel
    masked_difference: float
    repairs: dict[str, Repair]

    def to_json(self) -> dict[str, Any]:
        repairs = {key: asdict(repair) for key, repair in self.repairs.items()}
        return {"masked_difference": self.masked_difference, "repairs": repairs}


#: Largest relative difference between masked and dense outputs; float32 rounding in a deep model stays below it.
MASKED_TOLERANCE = 1e-4


def apply_plan(
    model: TaskModel,
    structure: Structure,
    plan: Plan,
    batches: Sequence[Batch],
    inputs: Inputs,
    settings: RepairSettings,
    *,
    weights: Weights | None = None,
    reference: Reference | None = None,
    at_work: AtWork = contextlib.nullcontext,
) -> PrunedModel:
    """Rebuild `model` densely by `plan`, check it against the masked original, and repair it on `batches`.

    inputs: a few real rows, for tracing and for the check. weights, reference: the `sensitivities` and the `outputs_of`
    of `model` on `batches`, to share between several plans. at_work: a context held while `model` runs for the repair.
    Raises InputError if the repair becomes non-finite, RuntimeError (a bug) if the dense model differs from the masked
    one.
    """
    dense, smaller = rebuild(model, structure, plan.groups, inputs)
    difference = masked_difference(model, dense, structure, plan, inputs)
    if difference > MASKED_TOLERANCE and any(group.found for group in structure.groups):
        raise InputError(
            "the model cannot be pruned by this plan",
            f"the rebuilt model differs from the masked one by {difference:.2e}, so its units were not found rightly",
            "name one kind in prune.units, or declare a family for this architecture (docs/families.md)",
        )
    if difference > MASKED_TOLERANCE:
        raise RuntimeError(f"the rebuilt model differs from the masked one by {difference:.2e}")
    tokens = find_tokens(model) if any(plan.merged) else None
    # The merged stream does not distinguish padding, so text models are repaired before tokens are merged.
    if tokens is not None and not tokens.padded:
        dense = insert_merging(dense, structure, tokens, plan.merged)
    repairs: dict[str, Repair] = {}
    if settings.repair:
        repairs = compensate(
            model,
            dense,
            structure,
            smaller,
            plan.groups,
            batches,
            settings,
            dimensions=plan.dimensions,
            weights=weights,
            at_work=at_work,
        )
    narrow(dense, structure.attentions, plan.dimensions)
    if settings.repair and settings.gauss_newton:
        reference = outputs_of(model, structure, batches, settings.seed) if reference is None else reference
        repairs[OUTPUT] = refine(dense, reference, temperature=settings.temperature, at_work=at_work)
    if not all(torch.isfinite(tensor).all() for tensor in dense.state_dict().values() if tensor.is_floating_point()):
        raise InputError(
            "compensation did not give finite weights", "activations are NaN or constant", "set prune.compensate: false"
        )
    if tokens is not None and tokens.padded:
        dense = insert_merging(dense, structure, tokens, plan.merged)
    return PrunedModel(dense, difference, repairs)


def masked_difference(model: TaskModel, dense: TaskModel, structure: Structure, plan: Plan, inputs: Inputs) -> float:
    """Largest difference between the masked original's and the dense model's output, relative to the output's scale."""
    masks = {}
    for group in structure.groups:
        masks[group.key] = torch.zeros(group.count)
        masks[group.key][list(plan.groups[group.key].kept)] = 1.0
    with torch.no_grad():
        with masked(model, structure.groups, masks):
            expected = model(**inputs)
        got = dense(**inputs)
    return float((got - expected).abs().max() / expected.abs().max().clamp(min=1e-12))
