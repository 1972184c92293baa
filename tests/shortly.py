"""Measurements for tests of what is measured, not of how precisely; tests run beside one another, so nobody watches."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

SHORT = {
    # Three rounds: engines are loaded again in each, which takes longer than their calls.
    **{"BLOCKS": 6, "MAX_BLOCKS": 6, "PER_ROUND": 2, "PER_SLOW_ROUND": 2},
    **{"BLOCK_SECONDS": 0.002, "WARM_UP_SECONDS": 0.01, "WARM_UP_AGAIN": 0.01, "ATTEMPTS": 1},
}


#: PYTHONPATH of processes that measure shortly, and import the package from this clone.
SHORTLY = os.pathsep.join([str(Path(__file__).parent / "short"), str(Path(__file__).parents[1])])


def measure_shortly(assign: Callable[[Any, str, Any], None] = setattr) -> None:
    """Few short blocks, for the rest of this process or, by `MonkeyPatch.setattr`, of a test."""
    from optin_export.measure import latency
    from optin_export.measure.neighbours import Neighbours

    for name, value in SHORT.items():
        assign(latency, name, value)
    assign(latency.Watch, "seen", lambda watch: Neighbours(others=0.0, stolen=0.0))
