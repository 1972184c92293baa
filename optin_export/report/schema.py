"""report.json as pydantic models: the published contract. `docs/schemas/report.schema.json` is generated from here."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from optin_export.errors import InputError
from optin_export.recipe import Precision
from optin_export.recipe.schema import METRICS
from optin_export.report.base import Part as _Part
from optin_export.report.latency import LatencyResult as LatencyResult
from optin_export.report.latency import Milliseconds as Milliseconds
from optin_export.report.latency import NeighboursResult as NeighboursResult
from optin_export.report.latency import SpeedupResult as SpeedupResult
from optin_export.search import PlanLatency
from optin_export.workdir.files import read_text


class GateResult(_Part):
    """One requirement; `measured` is null, and `passed` false, where it could not be evaluated."""

    name: str
    kind: Literal["parity", "gate"]
    relation: Literal[">=", "<="] = Field(description="of the measured to the required value")
    required: float
    measured: float | None
    passed: bool
    note: str

    @property
    def condition(self) -> str:
        return f"{self.relation} {self.required:g}"


class Verdict(_Part):
    passed: bool = Field(description="true only if every gate passed")
    summary: str = Field(description="one sentence for people")
    gates: tuple[GateResult, ...]

    @property
    def outcome(self) -> Literal["PASSED", "FAILED", "NOT EVALUATED"]:
        """FAILED if a gate was missed; NOT EVALUATED if none was, but some could not be evaluated."""
        if self.passed:
            return "PASSED"
        missed = any(not gate.passed and gate.measured is not None for gate in self.gates)
        return "FAILED" if missed else "NOT EVALUATED"


class Size(_Part):
    """Counted on the built torch models: MACs of one sample at the shipped shape, or parameters."""

    base: int
    pruned: int
    ratio: float


class AccuracyResult(_Part):
    """Points (metric x 100) of the first target's engines on the same rows; interval: paired bootstrap over rows."""

    metric: str
    rows: int
    base: float
    pruned: float
    drop: float
    drop_low: float
    drop_high: float
    engines: dict[str, float] = Field(
        default_factory=dict, description="points of every engine by name; base is fp32's, pruned the shipped one's"
    )
    base_low: float | None = Field(None, description="95 % interval of base, by bootstrap over rows")
    base_high: float | None = None
    chance: float | None = Field(None, description="what a guess reaches that does not see the inputs")
    warning: str | None = Field(None, description="why base says nothing, where it is not surely better than chance")

    @field_validator("metric")
    @classmethod
    def _is_known(cls, value: str) -> str:
        known = sorted({name for names in METRICS.values() for name in names})
        if value not in known:
            raise ValueError(f"this version knows no metric '{value[:60]}', only {', '.join(known)}")
        return value


class ParityResult(_Part):
    target: str
    model: Literal["base", "pruned"]
    batch: int
    rows: Literal["distinct", "identical"]
    max_error: float
    spread: float
    passed: bool
    precision: Precision = "fp32"
    cosine: float = Field(1.0, description="of the worst row and its reference")
    agreement: float | None = Field(None, description="share of choices that are the reference's; null: no classes")


class ToleranceResult(_Part):
    """What an engine of one precision may differ from the fp32 torch model."""

    error: float
    cosine: float
    agreement: float
    tie: float


class Parity(_Part):
    passed: bool
    tolerance: float = Field(description="of max_error, in fp32")
    max_error: float = Field(description="of the fp32 engines")
    tolerances: dict[str, ToleranceResult] = Field(default_factory=dict, description="by precision")
    cases: tuple[ParityResult, ...]


class DeployedArm(_Part):
    """One served model in one setting. Milliseconds as the client sees them; throughput in rows a second.

    queue, compute: per request, by the server's own count; rows_per_batch: how many rows it ran together.
    """

    p50: float
    p90: float
    p99: float
    throughput: float
    requests: int
    unsent: int = Field(0, description="open loop: due but never sent, the server was too slow")
    queue: float | None = None
    compute: float | None = None
    rows_per_batch: float | None = None


class DeployedResult(_Part):
    """Base and pruned model behind a server. closed: `concurrency` threads; open: `rate` requests a second, with
    latency counted from when a request was due. Raw samples are in measure/deployed.json."""

    source: Literal["client", "perf_analyzer"]
    server: str
    protocol: Literal["grpc", "http"]
    mode: Literal["closed", "open"]
    batch: int
    concurrency: int | None
    rate: float | None
    base: DeployedArm
    pruned: DeployedArm
    speedup: SpeedupResult | None = Field(None, description="null: the source gives no blocks to draw an interval from")
    noise_floor: float | None = None
    blocks: int | None = None
    largest_error: float | None = Field(None, description="of any answer, relative to what the torch model answers")


class StageResult(_Part):
    name: str
    seconds: float
    reused: bool
    peak_bytes: int | None = Field(
        None, description="most resident memory of the process during the stage; null: unknown"
    )


class EngineResult(_Part):
    target: str
    model: Literal["base", "pruned"]
    precision: Precision = "fp32"
    build_seconds: float
    facts: dict[str, Any]
    unmeasured: str | None = Field(None, description="why the engine was built but could not run on this machine")


class GroupResult(_Part):
    """One unit group of one block: units before and after, and the repair's squared error before and after."""

    block: int
    kind: str
    count: int
    kept: int
    score_kept: float
    error_before: float | None = None
    error_after: float | None = None
    damping: float | None = Field(None, description="of the refit: share of the Gram's diagonal, by held-out rows")
    fallback: str | None = Field(None, description="why the projection was left as it was, if it was")


class HeadRepair(_Part):
    """The refit of the layer that outputs the logits: mean squared error of the logits before and after."""

    error_before: float | None
    error_after: float | None
    damping: float | None
    fallback: str | None


class OutputRefit(_Part):
    """Gauss-Newton on the output: its divergence per sample on calibration rows held out, before and after."""

    before: float | None
    after: float | None
    damping: float | None = Field(description="of the last round's system, as a share of its mean diagonal")
    fallback: str | None = Field(description="why gains and biases were left as they were, if they were")


class FineTuned(_Part):
    """The short fine-tune that the recipe asked for; the losses are those on held-out rows."""

    by: str = Field(description="distill, labels, or the user's function")
    steps: int | None
    before: float | None
    after: float | None
    note: str | None = Field(description="why the repaired model was kept as it was, if it was")


class Tried(_Part):
    """One model of the search by accuracy: its budget, and the drop on the rows set apart for the search."""

    macs: float
    drop: float


class Pruning(_Part):
    family: str
    method: str
    info: dict[str, float]
    budget: dict[str, float]
    tried: tuple[Tried, ...] = ()
    compensated: bool
    masked_difference: float
    optimality_gap: float | None
    merged: tuple[int, ...] = Field((), description="tokens merged in each block, if any are")
    latency: PlanLatency | None = Field(None, description="how a budget of speedup or latency_ms was searched")
    groups: tuple[GroupResult, ...]
    head: HeadRepair | None = None
    output: OutputRefit | None = Field(None, description="null: not asked for")
    finetuned: FineTuned | None = Field(None, description="null: no weight was trained")


class MachineResult(_Part):
    """One target of the run on another machine, by `optin-export measure`; its gates are no part of the verdict.

    Raw samples are in machines/<machine>/measure/<target>.json.
    """

    machine: str
    target: str
    created: str = Field(description="ISO 8601, UTC")
    environment: dict[str, Any]
    gates: tuple[GateResult, ...]
    parity: Parity | None = Field(description="null: built, not run")
    accuracy: AccuracyResult | None
    accuracy_note: str | None = Field(description="why the accuracy was not measured there, if it was not")
    latency: tuple[LatencyResult, ...]
    engines: tuple[EngineResult, ...]


class StageCost(_Part):
    """What one stage took on a cluster's workers. Seconds are summed over workers, inside their work."""

    stage: str
    worker_seconds: float
    gpu_seconds: float = Field(description="worker-seconds times the GPUs that each held")
    tasks: int
    workers: int
    retried: int = Field(description="tasks given out again because a worker was lost")
    reused: int = Field(description="tasks that an earlier, interrupted run had done")
    bytes_out: int
    bytes_back: int


class Report(_Part):
    """Everything a run found out, verdict first."""

    version: Literal[1] = 1
    name: str
    created: str = Field(description="ISO 8601, UTC")
    verdict: Verdict
    model: dict[str, str]
    precision: Precision = Field("fp32", description="of what is shipped")
    macs: Size
    params: Size
    accuracy: AccuracyResult | None
    parity: Parity
    latency: tuple[LatencyResult, ...]
    deployed: tuple[DeployedResult, ...] = Field((), description="by `optin-export client --run`; empty: not measured")
    elsewhere: tuple[MachineResult, ...] = Field((), description="on other machines, by `optin-export measure`")
    pruning: Pruning
    engines: tuple[EngineResult, ...]
    costs: tuple[StageCost, ...] = Field((), description="of work on a cluster (--cluster); empty: there was none")
    stages: tuple[StageResult, ...]
    warnings: tuple[str, ...] = Field(
        (),
        description="reasons to doubt a result: other work while it was measured, an unpruned accuracy at chance "
        "level, what was decided by evidence when data was read, files that were damaged",
    )
    environment: dict[str, Any]


def read_report(run: Path) -> Report:
    """The report of a run. Raises InputError where there is none that can be read."""
    try:
        return Report.model_validate_json(read_text(run / "report.json"))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {run / 'report.json'}", str(error)[:300], "run the recipe again") from None
