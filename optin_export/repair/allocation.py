"""From loss curves to what the search adds up: the rules by which a plan can share the budget among groups.

    minimise  sum over groups of  loss(k) ^ power,     loss = share * trajectory + (1 - share) * output

With power 1 the losses of groups are taken to add up. They do not where many groups lose units: what one group loses
is the input of the next ones, and curves that flatten out ask to empty some groups altogether. With power 2 a large
loss in one group costs more than the same sum in several, so that the budget is spread; a uniform plan is far along
that way. Which rule fits depends on model and budget, so plans of all RULES are tried (`trials`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

#: Weight of the trajectory's loss in a curve, with both terms scaled to the same total; the output has the rest. A
#: classifier's accuracy depends on the divergence of its output; an embedding has no such term.
TRAJECTORY_SHARE = {"logits": 0.0, "regression": 0.5, "embedding": 0.5}


@dataclass(frozen=True)
class Rule:
    """share: the trajectory's weight; None: TRAJECTORY_SHARE. power: of the losses that are added up."""

    share: float | None = None
    power: float = 1.0


#: The rules that are tried, by their names in plan.json and in the report; the first one is the default.
RULES = {
    "sum": Rule(),
    "squares": Rule(power=2.0),
}
SUM = Rule()


def combined(curves: Mapping[str, np.ndarray], output_kind: str, rule: Rule = SUM) -> dict[str, np.ndarray]:
    """What each point of a curve adds to a plan's loss by `rule`, [points, 2] with the units kept.

    curves: [points, 3], see `loss_curves`. Both terms are scaled to the same total over all groups.
    """
    share = TRAJECTORY_SHARE[output_kind] if rule.share is None else rule.share
    totals = [sum(float(curve[:, column].mean()) for curve in curves.values()) for column in (1, 2)]
    if totals[1] <= 0:  # the output depends on no unit: only the trajectory decides
        share, totals[1] = 1.0, 1.0
    weights = share / max(totals[0], 1e-30), (1 - share) / totals[1]
    return {
        key: np.stack([curve[:, 0], _power(weights[0] * curve[:, 1] + weights[1] * curve[:, 2], rule.power)], axis=1)
        for key, curve in curves.items()
    }


def _power(losses: np.ndarray, power: float) -> np.ndarray:
    return losses if power == 1 else np.maximum(losses, 0.0) ** power
