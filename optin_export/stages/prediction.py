"""What the search predicts of the repaired model, in a sentence, and when it is a warning."""

from __future__ import annotations

import math

from optin_export.search import Plan

#: Share of rows with another class, and squared distance of normalised embeddings (2 - 2 cosine), from which the search
#: warns.
MOST_CHANGED, MOST_DISTANCE = 0.1, 0.4
#: Standard deviations to the lower end of the share's interval, which has to be above the limit: one or two of a few
#: rows say nothing.
DEVIATIONS = 1.28


def prediction(plan: Plan, output_kind: str) -> str:
    """What the trial of the plan's model showed; "" in plans of earlier versions."""
    if (expected := plan.trial) is None:
        return ""
    if expected.changed is not None:
        found = f"{expected.changed:.1%} get another class (divergence {expected.divergence:.3g})"
    elif output_kind == "embedding":
        found = f"the mean cosine with the unpruned embedding is {1 - expected.divergence / 2:.3f}"
    else:
        found = f"the mean squared difference of the outputs is {expected.divergence:.3g}"
    return f"of {expected.judged} calibration rows that a repair on {expected.fitted} others has not seen, {found}"


def is_large(plan: Plan, output_kind: str) -> bool:
    """Whether a model with this predicted loss cannot be expected to keep its accuracy."""
    if (expected := plan.trial) is None:
        return False
    if expected.changed is not None:
        return least_share(expected.changed, expected.judged) > MOST_CHANGED
    return output_kind == "embedding" and expected.divergence > MOST_DISTANCE


def least_share(share: float, rows: int) -> float:
    """The lower end of Wilson's interval of a share that was counted on this many rows."""
    square = DEVIATIONS**2 / rows
    half = DEVIATIONS * math.sqrt(share * (1 - share) / rows + square / (4 * rows))
    return (share + square / 2 - half) / (1 + square)


def warning(plan: Plan, output_kind: str) -> str | None:
    """The warning of a large predicted loss, in one sentence."""
    if not is_large(plan, output_kind):
        return None
    merge = "" if any(plan.merged) else "merge tokens (tokens.keep: auto) where the model allows it, "
    return (
        f"the search predicts a large loss: {prediction(plan, output_kind)}; ask for a larger prune.budget, {merge}"
        "give more calibration rows, or set prune.repair: distill"
    )


def merging(plan: Plan, alone: str, output_kind: str) -> str:
    """What a run says where tokens are merged although the recipe does not ask for it. alone: `prediction` of the plan
    without merging."""
    return (
        f"tokens are merged as well ({'+'.join(map(str, plan.merged))} per block), because units alone were predicted "
        f"to lose too much ({alone}); now {prediction(plan, output_kind)}; to keep all tokens: tokens.keep: 1.0"
    )
