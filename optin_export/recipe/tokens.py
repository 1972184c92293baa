"""The recipe section `tokens`: how many tokens are merged inside the model."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from optin_export.recipe.fields import Fraction, Number, Section

#: The default of `keep`.
IF_NEEDED = "if-needed"


class TokensSection(Section):
    """Token merging inside the model. Give `keep` or `schedule`, not both."""

    keep: Fraction | Literal["auto", "if-needed"] = Field(
        "if-needed",
        description="share of tokens left after the attention, averaged over blocks; 1: no merging; "
        "auto: the search decides how much merging saves (needs prune.budget.macs); "
        "if-needed: as auto, for image models that can merge, where units alone are predicted to lose too much",
    )
    schedule: tuple[Annotated[int, Field(ge=0), Number], ...] | None = Field(
        None,
        min_length=1,
        description="number of tokens merged in each block; 0 for blocks that are not listed",
        examples=[[8, 8]],
    )

    @model_validator(mode="after")
    def _one_of_both(self) -> TokensSection:
        if self.schedule is not None and self.keep not in (1.0, IF_NEEDED):
            raise ValueError("give keep or schedule, not both")
        return self

    @property
    def merges(self) -> bool:
        """Whether the recipe asks for merged tokens."""
        return self.keep not in (1.0, IF_NEEDED) or any(self.schedule or ())

    @property
    def if_needed(self) -> bool:
        """Whether the search may merge tokens although the recipe does not ask for it."""
        return self.keep == IF_NEEDED and self.schedule is None
