"""The plan: which units stay, as pure data that can be written, read, compared and replayed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from optin_export.errors import InputError
from optin_export.workdir.files import read_json


class GroupPlan(BaseModel):
    """One unit group: number of units, and sorted indices of the kept ones (empty: the sub-layer is removed)."""

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


class LatencyRound(BaseModel):
    """One plan of the search by latency: the table's prediction, and the measured time of its unrepaired engine.

    scale: the correction of the table's savings in this round. aim_ms: the limit of the predicted time in this round.
    base_ms, measured_ms: medians of interleaved calls, the latter with its 95 % interval, as has speedup, their ratio.
    macs: share of the unpruned model's MACs. met: the whole interval is within the budget.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    scale: float
    aim_ms: float
    predicted_ms: float
    base_ms: float
    measured_ms: float
    measured_low: float
    measured_high: float
    speedup: float
    speedup_low: float
    speedup_high: float
    macs: float
    met: bool


class PlanLatency(BaseModel):
    """How a latency budget was met: the target's table, and every round of plan, engine and correction."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    target: str
    batch: int
    sequence: int | None
    base_ms: float = Field(description="time of the unpruned engine in the table")
    predicted_ms: float = Field(description="predicted time of the chosen plan, before any correction")
    measured_ms: float = Field(description="time of an engine of the chosen plan, measured in the search")
    chosen: int = Field(description="index of the round whose plan was chosen, from 0")
    rounds: tuple[LatencyRound, ...]


class PlanTrial(BaseModel):
    """What the search predicts: the plan's model, repaired on `fitted` calibration rows, on `judged` others.

    divergence: of the output from the unpruned model's, per sample. changed: share of the samples whose largest logit
    is another; null if the outputs are no classes.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    fitted: int
    judged: int
    divergence: float
    changed: float | None


class PlanAlignment(BaseModel):
    """The multiples in which units are kept, and what they cost."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    features: Annotated[int, Field(ge=1)] = Field(description="kept features of a layer are multiples of this number")
    reason: str
    smaller: Annotated[int, Field(ge=0)] = Field(
        description="number of groups that are too small for it and have smaller multiples"
    )
    lost: float | None = Field(
        description="share of the budget's whole cost (MACs or parameters) that a plan with any numbers of units would "
        "not need to keep as much score (to lose as little); null with a budget of time"
    )


class Plan(BaseModel):
    """The result of the search. score_kept: the kept units' share of the total score."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1] = 1
    budget: dict[Literal["macs", "params", "speedup", "latency_ms"], float]
    base: Cost
    predicted: Cost
    score_kept: float
    optimality_gap: float | None = Field(
        description="bound on the share of score (loss) lost by rounding; 0: exact; null: linearised"
    )
    predicted_loss: float | None = Field(
        None, description="sum of the loss curves at the chosen counts; null: no curves"
    )
    groups: dict[str, GroupPlan]
    merged: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        (), description="number of tokens merged in each block; empty: no merging"
    )
    dimensions: dict[str, Annotated[int, Field(ge=1)]] = Field(
        {}, description="dimensions of queries and keys per head in attentions that have fewer than the unpruned model"
    )
    rounds: Annotated[int, Field(ge=1)] = Field(1, description="1; more in some plans of earlier versions")
    latency: PlanLatency | None = Field(None, description="only with a budget of speedup or latency_ms")
    trial: PlanTrial | None = Field(None, description="the predicted loss, before the repair")
    alignment: PlanAlignment | None = Field(None, description="null in plans of earlier versions")


def read_plan(path: Path) -> Plan:
    """Read a plan. Raises InputError if the file is not a valid plan."""
    try:
        return Plan.model_validate(read_json(path))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read the plan {path}", str(error)[:300], "run the recipe again") from None


def keep_first(counts: dict[str, tuple[int, int]]) -> dict[str, GroupPlan]:
    """Groups {key: (count, kept)} that keep their first units: enough to rebuild shapes before loading weights."""
    return {key: GroupPlan(count=count, kept=tuple(range(kept))) for key, (count, kept) in counts.items()}
