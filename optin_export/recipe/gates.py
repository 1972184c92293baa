"""The section `gates`: what a run has to reach, or nothing ships."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from optin_export.recipe.fields import Fraction, Number, Positive, Section

#: Share of the CPU time that other processes and a virtual machine's host may take while latency is measured: more than
#: a machine that is left alone shows, less than one process on one of a few CPUs (docs/results.md).
MOST_OTHER_WORK = 0.1


class Gates(Section):
    speedup: Positive | None = Field(
        None,
        description="least speedup: lower end of the 95 % interval, at the slowest gain of all targets and batch sizes",
        examples=[1.3],
    )
    accuracy_drop: Annotated[float, Number] | None = Field(
        None, description="largest loss in points, engine against engine on the evaluation rows", examples=[0.5]
    )
    accuracy_drop_high: Annotated[float, Number] | None = Field(
        None,
        description="largest upper end of the loss's 95 % interval, in points; accuracy_drop judges the loss that was "
        "measured, whatever its interval",
        examples=[1.0],
    )
    other_work: Fraction | None = Field(
        None,
        description="largest share of the machine's CPU time that other work may take while latency is measured; above "
        "it gates on speedup and latency are not evaluated; default: 0.1",
        examples=[0.3],
    )

    @property
    def most_other_work(self) -> float:
        return MOST_OTHER_WORK if self.other_work is None else self.other_work
