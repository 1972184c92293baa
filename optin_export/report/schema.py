"""report.json as pydantic models: the published contract. `docs/schemas/report.schema.json` is generated from here."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from optin_export.errors import InputError
from optin_export.recipe import Precision
from optin_export.recipe.tasks import METRICS, OWN_METRIC
from optin_export.report.base import Part as _Part
from optin_export.report.latency import LatencyResult as LatencyResult
from optin_export.report.latency import Milliseconds as Milliseconds
from optin_export.report.latency import NeighboursResult as NeighboursResult
from optin_export.report.latency import SpeedupResult as SpeedupResult
from optin_export.search import PlanAlignment, PlanLatency, PlanTrial
from optin_export.workdir.files import read_text


class GateResult(_Part):
    """One gate. If it could not be evaluated, `measured` is null and `passed` is false."""

    name: str
    kind: Literal["parity", "gate"]
    relation: Literal[">=", "<="] = Field(description="required relation of `measured` to `required`")
    required: float
    measured: float | None
    passed: bool
    note: str

    @property
    def condition(self) -> str:
        return f"{self.relation} {self.required:g}"


class Verdict(_Part):
    passed: bool = Field(description="true only if every gate passed")
    summary: str = Field(description="one sentence for readers")
    gates: tuple[GateResult, ...]

    @property
    def outcome(self) -> Literal["PASSED", "FAILED", "NOT EVALUATED"]:
        """FAILED if a gate was missed; NOT EVALUATED if none was missed, but some could not be evaluated."""
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
        default_factory=dict,
        description="points of every engine by name; base is the fp32 engine, pruned the shipped one",
    )
    base_low: float | None = Field(None, description="95 % interval of base, by bootstrap over rows")
    base_high: float | None = None
    chance: float | None = Field(None, description="metric of a guess that does not see the inputs")
    warning: str | None = Field(
        None, description="set if base is not surely better than chance: why the loss means nothing"
    )

    @field_validator("metric")
    @classmethod
    def _is_known(cls, value: str) -> str:
        known = sorted({name for names in METRICS.values() for name in names})
        if value not in known and not re.fullmatch(OWN_METRIC, value):
            raise ValueError(f"this version has no metric '{value[:60]}', only {', '.join(known)}")
        return value


class ParityResult(_Part):
    target: str
    model: Literal["base", "pruned"]
    batch: int
    rows: Literal["distinct", "identical", "short"]
    max_error: float
    spread: float
    passed: bool
    precision: Precision = "fp32"
    cosine: float = Field(1.0, description="cosine between the worst row and its reference")
    agreement: float | None = Field(None, description="share of rows with the reference's class; null: no classes")
    failure: str | None = Field(None, description="what the engine said, if it could not run these inputs")
    rounding: float | None = Field(
        None, description="max_error of the torch model in fp32 against itself in fp64; null: not needed, or not known"
    )


class ToleranceResult(_Part):
    """Tolerances of one precision, against the fp32 torch model."""

    error: float
    cosine: float
    agreement: float
    tie: float


class Parity(_Part):
    passed: bool
    tolerance: float = Field(description="limit of max_error in fp32")
    max_error: float = Field(description="largest error of the fp32 engines")
    tolerances: dict[str, ToleranceResult] = Field(default_factory=dict, description="tolerances by precision")
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
    unsent: int = Field(
        0, description="open loop: requests that were due but not sent, because the server was too slow"
    )
    queue: float | None = None
    compute: float | None = None
    rows_per_batch: float | None = None


class DeployedResult(_Part):
    """Base and pruned model on a server. closed: `concurrency` threads; open: `rate` requests a second, with
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
    speedup: SpeedupResult | None = Field(None, description="null: the source has no blocks, so there is no interval")
    noise_floor: float | None = None
    blocks: int | None = None
    largest_error: float | None = Field(
        None, description="largest error of any answer, relative to the torch model's answer"
    )


class StageResult(_Part):
    name: str
    seconds: float
    reused: bool
    first_seconds: float | None = Field(
        None, description="seconds of the stage's last execution, if it was reused in this run; null: unknown"
    )
    expected_seconds: float | None = Field(
        None, description="forecast from one forward and backward pass before the first run; null: none"
    )
    expected_peak_bytes: int | None = Field(None, description="the same for the peak memory")
    peak_bytes: int | None = Field(
        None, description="peak resident memory of the process during the stage; null: unknown"
    )


class EngineResult(_Part):
    target: str
    model: Literal["base", "pruned"]
    precision: Precision = "fp32"
    build_seconds: float
    facts: dict[str, Any]
    unmeasured: str | None = Field(None, description="why the engine was built but could not run on this machine")


class CandidateResult(_Part):
    """One engine among which `engine: auto` chose."""

    target: str
    taken: bool
    ms: dict[str, float] = Field(
        {},
        description="median milliseconds of a call of the pruned engine by batch size, timed interleaved with the "
        "other candidates; empty: not timed",
    )
    reason: str | None = Field(None, description="why it was not taken, or which gates it missed")


class GroupResult(_Part):
    """One unit group of one block: units before and after, and the repair's squared error before and after."""

    block: int
    kind: str
    count: int
    kept: int
    score_kept: float | None = Field(description="null: dimensions of queries and keys, which are not scored")
    error_before: float | None = None
    error_after: float | None = None
    damping: float | None = Field(
        None, description="damping of the refit, as a share of the Gram matrix's mean diagonal; chosen on held-out rows"
    )
    fallback: str | None = Field(None, description="why the projection was not changed, if it was not")


class HeadRepair(_Part):
    """The refit of the layer that outputs the logits: mean squared error of the logits before and after."""

    error_before: float | None
    error_after: float | None
    damping: float | None
    fallback: str | None


class OutputRefit(_Part):
    """Gauss-Newton on the output: divergence per sample on held-out calibration rows, before and after."""

    before: float | None
    after: float | None
    damping: float | None = Field(description="damping of the last round's system, as a share of its mean diagonal")
    fallback: str | None = Field(description="why gains and biases were not changed, if they were not")


class FineTuned(_Part):
    """The short fine-tune of the recipe; losses on held-out rows."""

    by: str = Field(description="distill, labels, or the user's function")
    steps: int | None
    before: float | None
    after: float | None
    note: str | None = Field(description="why the fine-tuned weights were discarded, if they were")


class Tried(_Part):
    """One model of the search by accuracy: its MACs budget, and the drop on the rows reserved for the search."""

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
    merged: tuple[int, ...] = Field((), description="number of tokens merged in each block; empty: no merging")
    latency: PlanLatency | None = Field(None, description="how a budget of speedup or latency_ms was searched")
    trial: PlanTrial | None = Field(None, description="the loss that the search predicted, before the repair")
    alignment: PlanAlignment | None = Field(None, description="multiples in which units are kept, and what they cost")
    groups: tuple[GroupResult, ...]
    head: HeadRepair | None = None
    output: OutputRefit | None = Field(None, description="null: not in the recipe")
    finetuned: FineTuned | None = Field(None, description="null: no weight was trained")


class MachineResult(_Part):
    """One target of the run on another machine, by `optin-export measure`; its gates do not count for the verdict.

    Raw samples are in machines/<machine>/measure/<target>.json.
    """

    machine: str
    target: str
    created: str = Field(description="ISO 8601, UTC")
    environment: dict[str, Any]
    gates: tuple[GateResult, ...]
    parity: Parity | None = Field(description="null: the engine was built, but could not run")
    accuracy: AccuracyResult | None
    accuracy_note: str | None = Field(description="why the accuracy was not measured there, if it was not")
    latency: tuple[LatencyResult, ...]
    engines: tuple[EngineResult, ...]


class StageCost(_Part):
    """Cost of one stage on a cluster's workers. Seconds are working time, summed over workers."""

    stage: str
    worker_seconds: float
    gpu_seconds: float = Field(description="worker-seconds times the GPUs of each worker")
    tasks: int
    workers: int
    retried: int = Field(description="tasks repeated because a worker was lost")
    reused: int = Field(description="tasks reused from an earlier, interrupted run")
    bytes_out: int
    bytes_back: int


class Report(_Part):
    """All results of a run."""

    version: Literal[1] = 1
    name: str
    created: str = Field(description="ISO 8601, UTC")
    verdict: Verdict
    model: dict[str, str]
    precision: Precision = Field("fp32", description="precision of the shipped model")
    macs: Size
    params: Size
    accuracy: AccuracyResult | None
    parity: Parity
    latency: tuple[LatencyResult, ...]
    quick: bool = Field(
        False, description="latency is from a quick measurement (--quick, or measure.blocks below 24): a first look"
    )
    deployed: tuple[DeployedResult, ...] = Field(
        (), description="measurements by `optin-export client --run`; empty: none"
    )
    elsewhere: tuple[MachineResult, ...] = Field(
        (), description="measurements on other machines by `optin-export measure`"
    )
    pruning: Pruning
    engines: tuple[EngineResult, ...]
    candidates: tuple[CandidateResult, ...] = Field(
        (), description="engine: auto: the engines that were considered, fastest first; empty: the recipe names its own"
    )
    costs: tuple[StageCost, ...] = Field((), description="cost of the work on a cluster (--cluster); empty: none")
    stages: tuple[StageResult, ...]
    warnings: tuple[str, ...] = Field(
        (),
        description="reasons to doubt a result: other work during the measurement, an unpruned accuracy at chance "
        "level, guesses about the format of the data, damaged files",
    )
    environment: dict[str, Any]


def read_report(run: Path) -> Report:
    """Read the report of a run. Raises InputError if there is no readable report."""
    try:
        return Report.model_validate_json(read_text(run / "report.json"))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {run / 'report.json'}", str(error)[:300], "run the recipe again") from None
