"""The section `measure`: how long latency is measured."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from optin_export.recipe.fields import Number, Positive, Section

#: Blocks of a full measurement: at least, and at most on a restless machine.
FULL_BLOCKS, MOST_BLOCKS = 24, 96
#: Blocks of a quick one.
QUICK_BLOCKS = 6


class MeasureSection(Section):
    quick: bool = Field(
        False,
        description=f"measure {QUICK_BLOCKS} blocks for a first look, without waiting for other work to end; the "
        "result is marked as quick wherever it is shown (same as --quick)",
    )
    blocks: Annotated[int, Field(ge=4, le=10_000), Number] | None = Field(
        None,
        description="maximum number of blocks of interleaved calls per target and batch size; with less than "
        f"{FULL_BLOCKS} the result is marked as quick; default: {FULL_BLOCKS}, and up to {MOST_BLOCKS} until the "
        "interval is narrow",
        examples=[48],
    )
    seconds: Positive | None = Field(
        None,
        description="maximum time of the blocks per target and batch size; the measurement ends after the round in "
        "which it is over, but not before the second one; default: no limit",
        examples=[20.0],
    )

    @property
    def most_blocks(self) -> int | None:
        """Maximum number of blocks; None: as many as are needed."""
        return QUICK_BLOCKS if self.quick and self.blocks is None else self.blocks
