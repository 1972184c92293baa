"""Refit the pruned model's remaining weights so that it follows the unpruned one on the calibration rows.

Files, in the order in which a run uses them: `curves` (what removing k units of a group costs after repair),
`allocation` (what of it the search adds up), `token_schedule` (how many tokens each block keeps), `trial` (what a plan
loses, before the repair), `sensitivity` (the weights of the least squares), `settings` (which repair), `apply`
(rebuild, check, repair), `sequential` (block by block, with `paired_forward`, `layers`, `least_squares`, `relu`,
`residual_branch`, `output_layer`), `gauss_newton` (all layers at once, against the output), `finetune` (distillation;
optional). `effort` counts what they take, for forecasts.
No file depends on ONNX.
"""

from __future__ import annotations

from optin_export.repair.allocation import combined
from optin_export.repair.apply import MASKED_TOLERANCE, PrunedModel, apply_plan, masked_difference
from optin_export.repair.curves import loss_curves
from optin_export.repair.effort import (
    curves_effort,
    merging_effort,
    probed_bytes,
    repair_effort,
    sensitivity_effort,
    system_bytes,
    trial_effort,
)
from optin_export.repair.finetune import FineTune, fine_tune
from optin_export.repair.gauss_newton import outputs_of, refine
from optin_export.repair.sensitivity import Weights, graph, sensitivities
from optin_export.repair.sequential import Repair, compensate
from optin_export.repair.settings import RepairSettings
from optin_export.repair.token_schedule import scheduled, share_budget, tokens_of
from optin_export.repair.trial import judge, trial_batches

__all__ = [
    "MASKED_TOLERANCE",
    "FineTune",
    "PrunedModel",
    "Repair",
    "RepairSettings",
    "Weights",
    "apply_plan",
    "combined",
    "compensate",
    "curves_effort",
    "fine_tune",
    "graph",
    "judge",
    "loss_curves",
    "masked_difference",
    "merging_effort",
    "outputs_of",
    "probed_bytes",
    "refine",
    "repair_effort",
    "scheduled",
    "sensitivities",
    "sensitivity_effort",
    "share_budget",
    "system_bytes",
    "tokens_of",
    "trial_batches",
    "trial_effort",
]
