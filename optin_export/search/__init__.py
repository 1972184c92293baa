"""Find a plan from scores, costs and a budget; independent of torch modules."""

from __future__ import annotations

from typing import TYPE_CHECKING

from optin_export import lazy

if TYPE_CHECKING:
    from optin_export.search.aligned import lost_to_alignment
    from optin_export.search.allocate import check_budget, find_plan
    from optin_export.search.bisection import Bisection, smallest_budget
    from optin_export.search.merging import (
        allocate_merging,
        check_merging,
        kept_share,
        most,
        spread_merging,
        tokens_left,
    )
    from optin_export.search.plan import (
        Cost,
        GroupPlan,
        LatencyRound,
        Plan,
        PlanAlignment,
        PlanLatency,
        PlanTrial,
        keep_first,
        read_plan,
    )
    from optin_export.search.table import MOST_ENGINES, Anchor, LatencyTable, anchor_counts, signatures

__all__ = [
    "MOST_ENGINES",
    "Anchor",
    "Bisection",
    "Cost",
    "GroupPlan",
    "LatencyRound",
    "LatencyTable",
    "Plan",
    "PlanAlignment",
    "PlanLatency",
    "PlanTrial",
    "allocate_merging",
    "anchor_counts",
    "check_budget",
    "check_merging",
    "find_plan",
    "keep_first",
    "kept_share",
    "lost_to_alignment",
    "most",
    "read_plan",
    "signatures",
    "smallest_budget",
    "spread_merging",
    "tokens_left",
]

__getattr__, __dir__ = lazy.names(
    __name__,
    {
        "aligned": "lost_to_alignment",
        "allocate": "check_budget find_plan",
        "bisection": "Bisection smallest_budget",
        "merging": "allocate_merging check_merging kept_share most spread_merging tokens_left",
        "plan": "Cost GroupPlan LatencyRound Plan PlanAlignment PlanLatency PlanTrial keep_first read_plan",
        "table": "MOST_ENGINES Anchor LatencyTable anchor_counts signatures",
    },
)
