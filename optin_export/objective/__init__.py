"""The objective: how far a changed model's trajectory and output are from the unpruned model's, on calibration rows.

`observation` holds what the unpruned model does on a batch, `losses` compares with it, `probes` are random directions
of what the losses square. Scores, loss curves, row weights and repairs all minimise, or estimate, these two losses.
"""

from __future__ import annotations

from optin_export.objective.losses import (
    divergence,
    mean_output_loss,
    output_losses,
    relation,
    trajectory_losses,
)
from optin_export.objective.observation import Observation, compared_output, normalised_rows, observe
from optin_export.objective.probes import (
    ORTHOGONAL_CLASSES,
    OutputNoise,
    orthogonal,
    output_probe,
    trajectory_probe,
)

__all__ = [
    "ORTHOGONAL_CLASSES",
    "Observation",
    "OutputNoise",
    "compared_output",
    "divergence",
    "mean_output_loss",
    "normalised_rows",
    "observe",
    "orthogonal",
    "output_losses",
    "output_probe",
    "relation",
    "trajectory_losses",
    "trajectory_probe",
]
