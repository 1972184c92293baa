"""How a pruned model is repaired."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class RepairSettings:
    """A recipe's repair, shared by the loss curves and by the plan that they lead to.

    repair: refit the layers around the units by least squares, find one factor per kept unit ("rescale"), or change
    nothing (`prune.compensate`). gauss_newton: then refit gains and biases to the output. temperature: of the
    divergence between outputs (`prune.temperature`). seed: seed of the probes. autocast: "bfloat16" or "float16" for
    the passes that only estimate (weights of rows, predicted losses); None: as the model is.
    """

    repair: bool | Literal["rescale"] = True
    gauss_newton: bool = False
    temperature: float = 1.0
    seed: int = 0
    autocast: str | None = None
