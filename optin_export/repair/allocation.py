"""From loss curves to what the search adds up: one loss per point, from the trajectory's and the output's."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

#: Weight of the trajectory's loss in a curve, with both terms scaled to the same total; the output has the rest. A
#: classifier's accuracy depends on the divergence of its output; an embedding has no such term.
TRAJECTORY_SHARE = {"logits": 0.0, "regression": 0.5, "embedding": 0.5}


def combined(curves: Mapping[str, np.ndarray], output_kind: str, share: float | None = None) -> dict[str, np.ndarray]:
    """One loss per point of a curve, [points, 2] with the units kept: share * trajectory + (1 - share) * output.

    curves: [points, 3], see `loss_curves`. Both terms are scaled to the same total over all groups. share: None:
    TRAJECTORY_SHARE.
    """
    share = TRAJECTORY_SHARE[output_kind] if share is None else share
    totals = [sum(float(curve[:, column].mean()) for curve in curves.values()) for column in (1, 2)]
    if totals[1] <= 0:  # the output depends on no unit: only the trajectory decides
        share, totals[1] = 1.0, 1.0
    weights = share / max(totals[0], 1e-30), (1 - share) / totals[1]
    return {
        key: np.stack([curve[:, 0], weights[0] * curve[:, 1] + weights[1] * curve[:, 2]], axis=1)
        for key, curve in curves.items()
    }
