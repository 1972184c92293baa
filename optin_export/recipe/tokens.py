"""The recipe section `tokens`: how many tokens are merged inside the model."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from optin_export.recipe.fields import Fraction, Number, Section


class TokensSection(Section):
    """Token merging inside the model. Give `keep` or `schedule`, not both."""

    keep: Fraction | Literal["auto"] = Field(
        1.0,
        description="share of tokens left after the attention, averaged over blocks; 1: no merging; "
        "auto: the search decides how much merging saves (needs prune.budget.macs)",
    )
    schedule: tuple[Annotated[int, Field(ge=0), Number], ...] | None = Field(
        None,
        min_length=1,
        description="number of tokens merged in each block; 0 for blocks that are not listed",
        examples=[[8, 8]],
    )

    @model_validator(mode="after")
    def _one_of_both(self) -> TokensSection:
        if self.schedule is not None and "keep" in self.model_fields_set and self.keep != 1.0:
            raise ValueError("give keep or schedule, not both")
        return self

    @property
    def merges(self) -> bool:
        """Whether any token is merged, or may be."""
        return self.keep != 1.0 or any(self.schedule or ())
