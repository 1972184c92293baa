"""The section `gates`: limits for the result. If one is missed, nothing ships."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from optin_export.recipe.fields import Fraction, Number, Positive, Section

#: Share of the CPU time that other processes and a virtual machine's host may take while latency is measured: more than
#: on an idle machine, less than one process on one of a few CPUs (docs/results.md).
MOST_OTHER_WORK = 0.1


class Gates(Section):
    speedup: Positive | None = Field(
        None,
        description="minimum speedup: lower end of the 95 % interval, at the batch size and target with the least",
        examples=[1.3],
    )
    accuracy_drop: Annotated[float, Number] | None = Field(
        None,
        description="maximum loss in points, pruned against unpruned engine on the evaluation rows",
        examples=[0.5],
    )
    accuracy_drop_high: Annotated[float, Number] | None = Field(
        None,
        description="maximum for the upper end of the loss's 95 % interval, in points (accuracy_drop limits the "
        "measured loss itself)",
        examples=[1.0],
    )
    other_work: Fraction | None = Field(
        None,
        description="maximum share of the machine's CPU time that other work may take while latency is measured; above "
        "it, gates on speedup and latency are not evaluated; default: 0.1",
        examples=[0.3],
    )

    @property
    def most_other_work(self) -> float:
        return MOST_OTHER_WORK if self.other_work is None else self.other_work
