"""Check, before any work is done, that a metric, or training on labels, is defined for a model."""

from __future__ import annotations

from typing import Any

import numpy as np

from optin_export.errors import InputError

_ONE_CLASS = ("accuracy", "f1", "f1_binary", "mcc", "auc", "top5")
_AMOUNT = ("spearman", "pearson")


def check_metric(metric: str, task: str, outputs: int, regression: bool, problem: str | None) -> None:
    """Raises InputError for a metric that is not defined for the model's output.

    outputs: features per row of the model's output. problem: `problem_type` of transformers' configuration.
    """
    classifies = task.endswith("classification")
    text = task == "text-classification"
    if not classifies:
        return
    if metric in _ONE_CLASS and (outputs == 1 or regression):
        raise InputError(
            f"the metric {metric} is not defined for this model",
            "it outputs one number for each row, and no class",
            "use spearman or pearson" if text else "use a model with one output per class",
        )
    if metric in _ONE_CLASS and problem == "multi_label_classification":
        raise InputError(
            f"the metric {metric} is not defined for this model",
            f"its problem_type is {problem}: it gives yes or no for each of {outputs} classes, and {metric} needs "
            "one class per row",
            "leave data.evaluation out, or give a model with one class per row",
        )
    if metric in _ONE_CLASS and problem == "regression":
        raise InputError(
            f"the metric {metric} is not defined for this model",
            f"its problem_type is regression: its {outputs} outputs are numbers, not classes",
            "leave data.evaluation out, or correct problem_type in the model's config.json",
        )
    if (metric == "f1_binary" and outputs != 2) or (metric == "top5" and outputs <= 5):
        raise InputError(
            f"the metric {metric} is not defined for this model",
            f"it has {outputs} classes, and {metric} needs {'two' if metric == 'f1_binary' else 'more than five'}",
            "use accuracy or f1",
        )
    if metric in _AMOUNT and outputs > 1:
        raise InputError(
            f"the metric {metric} is not defined for this model",
            f"it has {outputs} outputs, one per class, and {metric} compares one number for each row",
            "use accuracy or f1",
        )


def check_training(outputs: int, regression: bool, problem: str | None) -> None:
    """Raises InputError for a model that cannot be trained on one class, or one number, per row."""
    if problem == "multi_label_classification" or (problem == "regression" and outputs > 1):
        raise InputError(
            "the fine-tune cannot train this model on labels",
            f"its problem_type is {problem} with {outputs} outputs; it trains on one class, or one number, per row",
            "set finetune.loss: distill, or give your own function in finetune.source",
        )
    if outputs == 1 and not regression:
        raise InputError(
            "the fine-tune cannot train this model on labels",
            "it has one output, so there are no classes",
            "set finetune.loss: distill, or give your own function in finetune.source",
        )


def check_amounts(metric: str, labels: Any) -> None:
    """Raises InputError for labels without a defined correlation: all the same, or fewer than two."""
    if len(labels) < 2 or np.ptp(np.asarray(labels)) == 0:
        raise InputError(
            f"the metric {metric} is not defined for this data",
            f"{len(labels)} rows with the label {labels[0]:g} only",
            "give rows of different labels; check columns.label",
        )
