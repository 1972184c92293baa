"""The plan: which units stay, as pure data that can be written, read, compared and replayed."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class GroupPlan(BaseModel):
    """One unit group: how many units it had, and the sorted indices of those that stay (none: the sub-layer goes)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    count: Annotated[int, Field(ge=1)]
    kept: tuple[Annotated[int, Field(ge=0)], ...]

    @model_validator(mode="after")
    def _indices_fit(self) -> GroupPlan:
        if list(self.kept) != sorted(set(self.kept)) or (self.kept and self.kept[-1] >= self.count):
            raise ValueError(f"kept must be sorted, distinct indices below {self.count}")
        return self


class Cost(BaseModel):
    """Predicted cost of the whole model for one sample at the shipped shape."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    macs: int
    params: int


class Plan(BaseModel):
    """The result of the search. score_kept: share of the total score of all units that stays."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1] = 1
    budget: dict[Literal["macs", "params"], float]
    base: Cost
    predicted: Cost
    score_kept: float
    optimality_gap: float | None = Field(
        description="bound on the share of the score (loss) that rounding costs; 0: exact; null: costs linearised"
    )
    predicted_loss: float | None = Field(None, description="sum of the loss curves at the chosen counts, if there are")
    groups: dict[str, GroupPlan]
    merged: tuple[Annotated[int, Field(ge=0)], ...] = Field((), description="tokens merged in each block, if any are")


def keep_first(counts: dict[str, tuple[int, int]]) -> dict[str, GroupPlan]:
    """Groups {key: (count, kept)} that keep their first units: enough to rebuild shapes before loading weights."""
    return {key: GroupPlan(count=count, kept=tuple(range(kept))) for key, (count, kept) in counts.items()}
