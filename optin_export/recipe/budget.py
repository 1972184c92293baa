"""prune.budget: what the smaller model may cost, or lose."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from optin_export.recipe.fields import Count, Fraction, Number, Positive, Section


class Budget(Section):
    """What the smaller model may cost, as a fraction of the unpruned model or by a target's clock, or what it may lose.

    Exactly one of macs, params, accuracy_drop, speedup, latency_ms.
    """

    macs: Fraction | None = Field(
        None, description="share of the unpruned model's multiply-accumulates that may stay", examples=[0.5]
    )
    params: Fraction | None = Field(None, description="share of the unpruned model's parameters that may stay")
    accuracy_drop: Annotated[float, Field(ge=0.0), Number] | None = Field(
        None,
        description="points that may be lost; the smallest model (in MACs) that keeps it is searched, on half of the "
        "evaluation rows",
        examples=[0.5],
    )
    speedup: Annotated[float, Field(ge=1.0), Number] | None = Field(
        None,
        description="of the engine on `target` over the unpruned one, measured; by a latency table of that target",
        examples=[1.5],
    )
    latency_ms: Positive | None = Field(
        None,
        description="milliseconds that one call of the engine on `target` may take, measured in the same way",
        examples=[2.0],
    )
    target: str | None = Field(
        None,
        description="speedup, latency_ms: the target's name; default: the first of targets",
        examples=["onnxruntime-cpu-1t"],
    )
    batch: Count | None = Field(None, description="speedup, latency_ms: of export.batch; default: the first")

    @model_validator(mode="after")
    def _exactly_one(self) -> Budget:
        kinds = (self.macs, self.params, self.accuracy_drop, self.speedup, self.latency_ms)
        if sum(value is not None for value in kinds) != 1:
            raise ValueError("name exactly one of: macs, params, accuracy_drop, speedup, latency_ms")
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
        """The limit by its name, as in {"macs": 0.5}."""
        return {name: value for name, value in self if isinstance(value, float)}

    def nanoseconds(self, base: int) -> int:
        """What one call may take where the unpruned engine takes `base` ns: the limit of the kind latency."""
        if self.latency_ms is not None:
            return int(self.latency_ms * 1e6)
        assert self.speedup is not None
        return int(base / self.speedup)

    @property
    def fraction(self) -> float:
        """The largest share of the cost; 1 where the accuracy decides."""
        return next((value for value in (self.macs, self.params) if value is not None), 1.0)
