"""Try a plan before the repair: build it, repair it on a few rows, and judge it on rows that it has not seen.

Losses of single groups do not add up: what one group loses, the next ones get as their input. A model that is built
shows what they lose together, which is the loss that a run predicts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from optin_export.data import Batch
from optin_export.models import TaskModel
from optin_export.objective import Reference, compared_output, output_losses
from optin_export.repair.curves import not_judged

#: Calibration rows on which a plan is repaired to try it.
TRIAL_ROWS = 256


def trial_batches(calibration: Sequence[Batch], judged: Sequence[Batch]) -> list[int]:
    """Indices of evenly spread batches with about TRIAL_ROWS rows, none of them `judged`, if there are others."""
    return not_judged(calibration, judged, TRIAL_ROWS)


def judge(model: TaskModel, references: Reference, temperature: float) -> tuple[float, float | None]:
    """Of a model's outputs: the mean divergence from the unpruned model's per sample, and the share of samples (the
    compared rows of one count as one) whose largest logit is another; None for outputs that are no classes."""
    total, changed, samples = 0.0, 0.0, 0
    classes = model.output_kind == "logits"
    with torch.no_grad():
        for reference in references:
            output = model(**reference.inputs)
            total += float(output_losses(model, reference, output, temperature).sum())
            samples += len(reference)
            if classes:
                rows = compared_output(model, reference, output)
                other = rows.argmax(-1) != reference.output.argmax(-1)
                changed += float((other * reference.weights).sum())
    return total / samples, changed / samples if classes else None
