"""Reasons to doubt a measured number: each becomes a warning, and some prevent the evaluation of a gate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from optin_export.measure.latency import Latency
from optin_export.measure.rounds import Speedup

#: The speedup times the remaining share of MACs is 1 if time is proportional to MACs. Engines measured so far stay
#: below this limit; a larger value is more often a disturbed clock than a fast model.
MOST_EFFICIENCY = 1.3
CLOCKS = {"p50": "wall-clock medians", "p90": "the 90th percentile of calls", "cpu": "CPU time"}


@dataclass(frozen=True)
class Doubt:
    """short: a few words for the verdict's line. text: one or two sentences with advice."""

    short: str
    text: str


def doubts(latency: Sequence[Latency], macs: float, other_work: float) -> list[Doubt]:
    """The doubts about these measurements.

    Args:
        latency: measurements of one run on one machine.
        macs: remaining share of the unpruned model's MACs.
        other_work: share of the CPU time that other work may take.
    """
    found = []
    for one in latency:
        where = f"{one.target} at batch {one.batch}{'' if one.judged else f' ({one.mode})'}"
        if is_busy(one, other_work):
            assert one.neighbours is not None
            share = f"{one.neighbours.share:.0%}"
            often = f" in the quietest of {one.attempts} measurements" if one.attempts > 1 else ""
            found.append(
                Doubt(
                    f"other work took {share} of the CPU time",
                    f"while {where} was timed, other work took {share} of this machine's CPU time{often}: the speedup "
                    "can be wrong although its interval is narrow. Stop the other work, and repeat the command with "
                    "--redo measure",
                )
            )
        if one.quick and one.judged:
            found.append(
                Doubt(
                    "quick measurement",
                    f"the latency of {where} is from a quick measurement of {one.blocks} blocks: its interval is wide, "
                    "and it is for a first look. Repeat the command without --quick before you rely on it",
                )
            )
        if one.clock != "p50":
            low, high = one.judged_speedup, one.speedup
            found.append(
                Doubt(
                    f"{CLOCKS[one.clock]} shows {low.median:.2f}x, {CLOCKS['p50']} {high.median:.2f}x",
                    f"the speedup of {where} is {low.median:.2f}x by {CLOCKS[one.clock]} and {high.median:.2f}x by "
                    f"{CLOCKS['p50']}, and their intervals do not meet: gates use the lower one. Another process that "
                    "shares the CPU does this; measure again on an idle machine",
                )
            )
        if is_implausible(one.judged_speedup, macs):
            ratio = one.judged_speedup.median
            found.append(
                Doubt(
                    f"{ratio:.2f}x is more than {macs:.0%} of the MACs explain",
                    f"{where} became {ratio:.2f}x faster with {macs:.0%} of the MACs: {ratio * macs:.2f} times what "
                    f"the MACs explain (above {MOST_EFFICIENCY}). A disturbed clock does this, and sometimes a model "
                    "that now fits into a cache: measure again on an idle machine before you rely on it",
                )
            )
    return found


def is_busy(one: Latency, other_work: float) -> bool:
    return one.neighbours is not None and one.neighbours.share > other_work


def is_implausible(speedup: Speedup, macs: float) -> bool:
    return speedup.median * macs > MOST_EFFICIENCY
