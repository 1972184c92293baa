"""prune.budget: the limit of the pruned model's cost or loss."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from optin_export.recipe.fields import Count, Fraction, Number, Positive, Section


class Budget(Section):
    """Limit of the pruned model: a share of the unpruned model's cost, a time on a target, or a loss.

    Exactly one of macs, params, accuracy_drop, speedup, latency_ms.
    """

    macs: Fraction | None = Field(None, description="maximum share of the unpruned model's MACs", examples=[0.5])
    params: Fraction | None = Field(None, description="maximum share of the unpruned model's parameters")
    accuracy_drop: Annotated[float, Field(ge=0.0), Number] | None = Field(
        None,
        description="maximum loss in points: searches the smallest model (in MACs) within it, on half of the "
        "evaluation rows",
        examples=[0.5],
    )
    speedup: Annotated[float, Field(ge=1.0), Number] | None = Field(
        None,
        description="minimum measured speedup over the unpruned engine on `target`; uses a latency table of it",
        examples=[1.5],
    )
    latency_ms: Positive | None = Field(
        None,
        description="maximum time of one call on `target` in milliseconds; uses a latency table of it",
        examples=[2.0],
    )
    target: str | None = Field(
        None,
        description="speedup, latency_ms: the target's name; default: the first of targets",
        examples=["onnxruntime-cpu-1t"],
    )
    batch: Count | None = Field(
        None, description="speedup, latency_ms: a batch size of export.batch; default: the first"
    )

    @model_validator(mode="after")
    def _exactly_one(self) -> Budget:
        kinds = (self.macs, self.params, self.accuracy_drop, self.speedup, self.latency_ms)
        if sum(value is not None for value in kinds) != 1:
            raise ValueError("give exactly one of: macs, params, accuracy_drop, speedup, latency_ms")
        if (self.target is not None or self.batch is not None) and self.kind != "latency":
            raise ValueError("target and batch belong to speedup and latency_ms")
        return self

    @property
    def kind(self) -> Literal["macs", "params", "latency"]:
        """What the search adds up."""
        if self.speedup is not None or self.latency_ms is not None:
            return "latency"
        return "params" if self.params is not None else "macs"

    @property
    def named(self) -> dict[str, float]:
        """{name of the limit: its value}, as in {"macs": 0.5}."""
        return {name: value for name, value in self if isinstance(value, float)}

    def nanoseconds(self, base: int) -> int:
        """Time limit of one call in nanoseconds, if the unpruned engine takes `base` ns; for the kind latency."""
        if self.latency_ms is not None:
            return int(self.latency_ms * 1e6)
        assert self.speedup is not None
        return int(base / self.speedup)

    @property
    def fraction(self) -> float:
        """The maximum share of the cost; 1 if the budget is an accuracy."""
        return next((value for value in (self.macs, self.params) if value is not None), 1.0)
