"""Gates of a release pipeline: a YAML file of limits, compared with the report of a finished run.

Nothing is measured again. A gate whose number is not in the report does not pass.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from optin_export.errors import InputError
from optin_export.recipe.fields import Count, Fraction, Number, Positive, Section
from optin_export.recipe.gates import MOST_OTHER_WORK
from optin_export.recipe.load import explain, read_mapping

if TYPE_CHECKING:
    from optin_export.report.schema import GateResult, LatencyResult, Report

MEASURED = "report.json"


class Where(Section):
    """The measurements that a gate judges: those of this target, batch size and machine; by default of all."""

    target: str | None = Field(
        None, description="a target's name, e.g. onnxruntime-cpu-1t; default: every target", examples=["torch-cpu-1t"]
    )
    batch: Count | None = Field(None, description="a batch size that was measured; default: every one")
    machine: str | None = Field(
        None,
        description="a machine's name in the report (`optin-export measure`); default: the run's own measurements",
        examples=["l4"],
    )


class SpeedupGate(Where):
    min: Positive = Field(description="least value of the lower end of the speedup's 95 % interval", examples=[1.3])


class LatencyGate(Where):
    max: Positive = Field(description="milliseconds that a call of the shipped engine may take", examples=[5.0])
    quantile: Literal["p50", "p90", "p99"] = Field("p50", description="quantile of the measured calls")


class GatesFile(Section):
    """Limits for a finished run; at least one."""

    gates: Annotated[Literal[1], Number] = Field(description="version of this file format")
    verdict: bool = Field(True, description="the gates of the run's own recipe must have passed")
    parity: bool = Field(True, description="every measured engine must compute the same as its model")
    accuracy_drop: Annotated[float, Number] | None = Field(
        None,
        description="most points that the shipped engine may lose against the unpruned one",
        examples=[0.5],
    )
    accuracy_drop_high: Annotated[float, Number] | None = Field(
        None, description="the same limit for the upper end of the 95 % interval of the loss", examples=[1.0]
    )
    accuracy: Annotated[float, Number] | None = Field(
        None, description="least accuracy of the shipped engine, in points", examples=[90.0]
    )
    macs: Fraction | None = Field(None, description="largest share of the unpruned model's MACs", examples=[0.5])
    params: Fraction | None = Field(None, description="largest share of the unpruned model's parameters")
    model_mib: Positive | None = Field(
        None, description="largest size of the shipped ONNX file (openvino: of its graph), in MiB", examples=[50]
    )
    other_work: Fraction | None = Field(
        None,
        description="largest share of the machine's CPU time that other work took while latency was measured; above it "
        "the gates speedup and latency_ms are not evaluated; default, for these two gates only: 0.1",
        examples=[0.1],
    )
    speedup: tuple[SpeedupGate, ...] = Field((), description="limits of the speedup", examples=[[{"min": 1.3}]])
    latency_ms: tuple[LatencyGate, ...] = Field((), description="limits of the latency", examples=[[{"max": 5}]])

    @model_validator(mode="after")
    def _any(self) -> GatesFile:
        if not (self.model_fields_set - {"gates"}):
            raise ValueError("the file has no gate")
        return self


def load_gates(path: Path) -> GatesFile:
    """Read a file of gates. Raises InputError if it is not valid."""
    raw = read_mapping(path, "gates file", "gates")
    try:
        return GatesFile.model_validate(raw)
    except ValidationError as error:
        raise InputError(f"the gates in {path} are not valid", explain(error, GatesFile), "correct them") from None


def judge(gates: GatesFile, report: Report, size: int | None) -> list[GateResult]:
    """Compare every gate with the report.

    Args:
        gates: the limits.
        report: the report of a finished run.
        size: bytes of the shipped ONNX file; None if it is not in the run folder.

    Returns:
        One result for each limit and each measurement that it judges.
    """
    from optin_export.report.schema import GateResult

    found: list[GateResult] = []

    def add(name: str, relation: Literal[">=", "<="], required: float, measured: float | None, note: str) -> None:
        kept = measured is not None and (measured >= required if relation == ">=" else measured <= required)
        kind: Literal["parity", "gate"] = "parity" if name == "parity" else "gate"
        found.append(
            GateResult(
                name=name, kind=kind, relation=relation, required=required, measured=measured, passed=kept, note=note
            )
        )

    if gates.verdict:
        missed = [gate.name for gate in report.verdict.gates if not gate.passed]
        note = f"missed: {', '.join(missed)}" if missed else "every gate of the recipe"
        add("verdict", ">=", 1, float(report.verdict.passed), f"share of the run's own verdict that passed; {note}")
    if gates.parity:
        cases = report.parity.cases
        right = sum(case.passed for case in cases) / len(cases) if cases else None
        add("parity", ">=", 1, right, "share of comparisons of an engine with its model that agree")
    accuracy = report.accuracy
    no_data = "" if accuracy else ": not measured in this run"
    for name, relation, value in (
        ("accuracy_drop", "<=", accuracy and accuracy.drop),
        ("accuracy_drop_high", "<=", accuracy and accuracy.drop_high),
        ("accuracy", ">=", accuracy and accuracy.pruned),
    ):
        required = getattr(gates, name)
        if required is not None:
            add(name, relation, required, value, f"points{f' of {accuracy.metric}' if accuracy else ''}{no_data}")  # type: ignore[arg-type]
    for name in ("macs", "params"):
        if (required := getattr(gates, name)) is not None:
            add(name, "<=", required, getattr(report, name).ratio, "share of the unpruned model's")
    if gates.model_mib is not None:
        note = "MiB of the shipped ONNX file" + (": the file does not exist" if size is None else "")
        add("model_mib", "<=", gates.model_mib, None if size is None else size / 2**20, note)
    if gates.other_work is not None:
        seen = [one.neighbours for one in report.latency]
        shares = [one.share for one in seen if one is not None]
        worst = max(shares) if shares and len(shares) == len(seen) else None
        note = "share of the CPU time while latency was measured" + (": it was not counted" if worst is None else "")
        add("other_work", "<=", gates.other_work, worst, note)
    for speedup in gates.speedup:
        for place, one in _matching(speedup, report):
            why = _disturbed(gates, one)
            low = one.judged_speedup.ci_low if one and not why else None
            add("speedup", ">=", speedup.min, low, f"lower end of the 95 % interval, {place}{why}")
    for latency in gates.latency_ms:
        for place, one in _matching(latency, report):
            why = _disturbed(gates, one)
            spent = getattr(one.pruned_ms, latency.quantile) if one and not why else None
            add("latency_ms", "<=", latency.max, spent, f"{latency.quantile} of the shipped engine, {place}{why}")
    return found


def _disturbed(gates: GatesFile, one: LatencyResult | None) -> str:
    """The reason why this measurement cannot be judged; empty if it can."""
    limit = MOST_OTHER_WORK if gates.other_work is None else gates.other_work
    if one is None or one.neighbours is None or one.neighbours.share <= limit:
        return ""
    return f"; not evaluated: other work took {one.neighbours.share:.0%} of the CPU time, {limit:.0%} is allowed"


def _matching(where: Where, report: Report) -> Iterator[tuple[str, LatencyResult | None]]:
    """(where it was measured, the measurement) for each that a gate judges; (why, None) without one."""
    machines: dict[str | None, list[LatencyResult]] = {None: list(report.latency)}
    for result in report.elsewhere:
        machines.setdefault(result.machine, []).extend(result.latency)
    rows = [one for one in machines.get(where.machine, []) if one.judged]
    wanted = [
        one
        for one in rows
        if (where.target is None or one.target == where.target) and (where.batch is None or one.batch == where.batch)
    ]
    on = f" on {where.machine}" if where.machine else ""
    for one in wanted:
        yield f"batch {one.batch} on {one.target}{on}", one
    if not wanted:
        asked: dict[str, tuple[Any, list[Any]]] = {
            "machine": (where.machine, [name for name in machines if name]),
            "target": (where.target, sorted({one.target for one in rows})),
            "batch": (where.batch, sorted({one.batch for one in rows})),
        }
        yield f"not measured: {_missing(asked)}", None


def _missing(asked: dict[str, tuple[Any, list[Any]]]) -> str:
    for kind, (value, known) in asked.items():
        if value is not None and value not in known:
            near = difflib.get_close_matches(str(value), [str(one) for one in known], n=1)
            return (
                f"{kind} '{value}'; "
                + (f"did you mean '{near[0]}'? " if near else "")
                + (f"the report has {', '.join(map(str, known))}" if known else "the report has none")
            )
    return "the report has no such measurement"
