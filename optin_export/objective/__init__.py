"""The objective: how far a changed model's trajectory and output are from the unpruned model's, on calibration rows.

`reference` holds the unpruned model's observations on the calibration rows, `losses` compares with them, `probes` are
random directions of the residuals that the losses square. Scores, loss curves, row weights and repairs all estimate or
minimise these losses.
"""

from __future__ import annotations

from optin_export.objective.losses import (
    divergence,
    mean_output_loss,
    output_losses,
    relation,
    trajectory_losses,
)
from optin_export.objective.observation import Observation, compared_output, normalised_rows, observation_of, observe
from optin_export.objective.probes import (
    ORTHOGONAL_CLASSES,
    OutputNoise,
    orthogonal,
    output_probe,
    trajectory_probe,
)
from optin_export.objective.reference import ROWS, Reference, derived, samples_of

__all__ = [
    "ORTHOGONAL_CLASSES",
    "ROWS",
    "Observation",
    "OutputNoise",
    "Reference",
    "compared_output",
    "derived",
    "divergence",
    "mean_output_loss",
    "normalised_rows",
    "observation_of",
    "observe",
    "orthogonal",
    "output_losses",
    "output_probe",
    "relation",
    "samples_of",
    "trajectory_losses",
    "trajectory_probe",
]
