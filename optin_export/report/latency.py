"""The parts of report.json about measured latency."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from optin_export.recipe import Precision, engine_name
from optin_export.report.base import Part


class Milliseconds(Part):
    p50: float
    p90: float
    p99: float


class SpeedupResult(Part):
    median: float
    ci_low: float
    ci_high: float


class ComparisonResult(Part):
    """How many times faster one engine is than another, both by name and measured in the same blocks."""

    engine: str
    against: str
    speedup: SpeedupResult


class NeighboursResult(Part):
    """Other work on the machine during the measurement, as shares of the CPU time of all its CPUs."""

    others: float = Field(description="share of other processes")
    stolen: float = Field(description="share taken by the host of a virtual machine (steal time)")

    @property
    def share(self) -> float:
        return self.others + self.stolen


class LatencyResult(Part):
    """Interleaved measurement of all engines; raw samples are in measure/latency.json.

    base_ms, pruned_ms, speedup and noise_floor compare both models in `precision`, as the gate does.
    """

    target: str
    batch: int
    sequence: int | None
    base_ms: Milliseconds
    pruned_ms: Milliseconds
    speedup: SpeedupResult
    noise_floor: float = Field(description="largest deviation from 1 of base against its second copy")
    blocks: int
    mode: str = Field("call", description="what one call includes: call (copies in and out), call+graph, device, ...")
    judged: bool = Field(True, description="whether the speedup gate uses this mode (targets.mode)")
    memory: dict[str, dict[str, int]] = Field({}, description="bytes on the GPU by engine: model, activations")
    clocks: dict[str, tuple[float, float]] = Field({}, description="lowest and highest reading of the GPU by NVML")
    clocks_note: str | None = Field(None, description="why clocks were not logged, if they were not")
    unmeasured: dict[str, str] = Field({}, description="modes that could not be measured, with the reason")
    precision: Precision = "fp32"
    engines_ms: dict[str, Milliseconds] = Field(default_factory=dict, description="latency of every engine by name")
    comparisons: tuple[ComparisonResult, ...] = Field(
        (), description="further comparisons besides `speedup`; empty in fp32"
    )
    neighbours: NeighboursResult | None = Field(None, description="null: unknown on this system, or an older run")
    by: dict[str, SpeedupResult] = Field(
        {}, description="the speedup by other clocks: p90 (90th percentiles) and, on CPU threads, cpu (CPU time)"
    )
    clock: Literal["p50", "p90", "cpu"] = Field(
        "p50", description="the clock that gates use: wall-clock medians, or the clock whose speedup is surely lower"
    )
    attempts: int = Field(1, description="number of measurements; more than 1 if other work disturbed the earlier ones")

    @property
    def judged_speedup(self) -> SpeedupResult:
        """The speedup that gates use."""
        return self.by.get(self.clock, self.speedup)

    @property
    def shipped(self) -> str:
        """Name of the engine that is shipped."""
        return engine_name("pruned", self.precision)

    def gain(self, engine: str, against: str) -> SpeedupResult:
        """How many times faster `engine` is than `against`; KeyError if the two were not compared."""
        found = {(one.engine, one.against): one.speedup for one in self.comparisons}
        return {(self.shipped, engine_name("base", self.precision)): self.speedup, **found}[engine, against]

    @property
    def precision_wins(self) -> bool:
        """Whether the shipped engine is surely faster than the same model in fp32; true where it is fp32."""
        return self.precision == "fp32" or self.gain(self.shipped, "pruned").ci_low > 1
