"""The report out of what the stages wrote: arithmetic on their results, and the verdict in one sentence."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from optin_export.families import Structure
from optin_export.measure import METRICS, TOLERANCES, Gate, Measured
from optin_export.measure.gpu import ranges
from optin_export.report.schema import (
    AccuracyResult,
    EngineResult,
    FineTuned,
    GateResult,
    GroupResult,
    HeadRepair,
    LatencyResult,
    OutputRefit,
    Parity,
    ParityResult,
    Report,
    Size,
    StageResult,
    ToleranceResult,
    Verdict,
)
from optin_export.search import Plan
from optin_export.surgery.compensate import HEAD
from optin_export.surgery.gauss_newton import OUTPUT


def compose(
    *,
    gates: Iterable[Gate],
    macs: Size,
    params: Size,
    measured: Measured,
    engines: Iterable[Mapping[str, Any]],
    stages: Sequence[StageResult],
    **rest: Any,
) -> Report:
    """A Report from typed results; `rest` are its remaining fields (name, model, pruning, environment)."""
    accuracy, latency = accuracy_result(measured), latency_results(measured)
    return Report(
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        verdict=make_verdict(
            [GateResult(**gate.to_json()) for gate in gates], macs, accuracy, latency, rest["pruning"].finetuned
        ),
        macs=macs,
        params=params,
        accuracy=accuracy,
        parity=parity_of(measured),
        latency=latency,
        engines=tuple(EngineResult(**engine) for engine in engines),
        stages=tuple(stages),
        **rest,
    )


def accuracy_result(measured: Measured) -> AccuracyResult | None:
    return AccuracyResult(**measured.accuracy.to_json()) if measured.accuracy else None


def latency_results(measured: Measured) -> tuple[LatencyResult, ...]:
    """Without the single calls, and of the GPU's readings the lowest and highest."""
    return tuple(
        LatencyResult(
            **{name: value for name, value in one.to_json().items() if name not in ("samples", "clocks")},
            clocks=ranges(one.clocks),
        )
        for one in measured.latency
    )


def busy_warnings(measured: Measured) -> list[str]:
    """One line for each measurement that something else on the machine disturbed."""
    return [
        f"while {one.target} was timed at batch {one.batch}{'' if one.judged else f' ({one.mode})'}, other work took "
        f"{one.neighbours.share:.0%} of this machine's CPU time: the speedup can be wrong although its interval is "
        "narrow. End what else runs, delete the run's folder measure and give the same command again"
        for one in measured.latency
        if one.neighbours is not None and one.neighbours.busy
    ]


def chance_warnings(measured: Measured) -> list[str]:
    """A line where the unpruned model is not surely better than a guess."""
    return [measured.accuracy.warning] if measured.accuracy and measured.accuracy.warning else []


def parity_of(measured: Measured) -> Parity:
    cases = tuple(ParityResult(**case.to_json()) for case in measured.parity)
    return Parity(
        passed=all(case.passed for case in cases),
        tolerance=TOLERANCES["fp32"].error,
        max_error=max((case.max_error for case in cases if case.precision == "fp32"), default=0.0),
        tolerances={
            name: ToleranceResult(**asdict(TOLERANCES[name]))
            for name in dict.fromkeys(case.precision for case in cases)
        },
        cases=cases,
    )


def prunings(
    structure: Structure, plan: Plan, scores: Mapping[str, np.ndarray], repairs: Mapping[str, Mapping[str, Any]]
) -> tuple[GroupResult, ...]:
    """What was removed, group by group, with the share of the group's score that stays and the repair's errors."""
    results = []
    for group in structure.groups:
        kept = list(plan.groups[group.key].kept)
        total = float(scores[group.key].sum())
        repair = repairs.get(group.key, {})
        results.append(
            GroupResult(
                block=group.block,
                kind=group.kind + group.part,
                count=group.count,
                kept=len(kept),
                score_kept=float(scores[group.key][kept].sum()) / total if total > 0 else 1.0,
                error_before=repair.get("before"),
                error_after=repair.get("after"),
                damping=repair.get("damping"),
                fallback=repair.get("fallback"),
            )
        )
    return tuple(results)


def head_repair(repairs: Mapping[str, Mapping[str, Any]]) -> HeadRepair | None:
    """The output layer's part of the repairs, if it had one."""
    repair = repairs.get(HEAD)
    if repair is None:
        return None
    return HeadRepair(
        error_before=repair["before"],
        error_after=repair["after"],
        damping=repair["damping"],
        fallback=repair["fallback"],
    )


def output_refit(repairs: Mapping[str, Mapping[str, Any]]) -> OutputRefit | None:
    """What Gauss-Newton did, if it was to do anything."""
    repair = repairs.get(OUTPUT)
    return None if repair is None else OutputRefit(**repair)


def make_verdict(
    gates: Sequence[GateResult],
    macs: Size,
    accuracy: AccuracyResult | None,
    latency: Sequence[LatencyResult],
    finetuned: FineTuned | None = None,
) -> Verdict:
    """The verdict and its one sentence: what was gained, what it cost, whether it was trained, and what was missed."""
    facts = []
    judged = [one for one in latency if one.judged]
    if judged:
        slowest = min(judged, key=lambda one: one.speedup.ci_low)
        among = ", the smallest gain measured" if len(judged) > 1 else ""
        alike = "" if slowest.precision == "fp32" else f" than the unpruned {slowest.precision} engine"
        facts.append(
            f"{slowest.speedup.median:.2f}x faster{alike} at batch {slowest.batch} on {slowest.target} "
            f"(95 % interval {slowest.speedup.ci_low:.2f} to {slowest.speedup.ci_high:.2f}{among})"
        )
        facts += _precision(latency)
    if accuracy is not None:
        change = f"{accuracy.base:.2f} to {accuracy.pruned:.2f}"
        verb = "lost" if accuracy.drop >= 0 else "gained"
        facts.append(
            f"{accuracy.metric} {change} (lower is better)"
            if METRICS[accuracy.metric].lower_is_better
            else f"{abs(accuracy.drop):.2f} points of {accuracy.metric} {verb} ({change})"
        )
    facts.append(f"{macs.ratio:.1%} of the MACs left")
    if finetuned is not None and finetuned.note is None:
        facts.append(f"fine-tuned by {finetuned.by}" + (f" for {finetuned.steps} steps" if finetuned.steps else ""))
    missed = [gate for gate in gates if not gate.passed]
    if missed:
        facts.append("missed: " + ", ".join(_miss(gate) for gate in missed))
    word = "FAILED" if missed else "PASSED"
    return Verdict(passed=not missed, summary=f"{word}: {'; '.join(facts)}.", gates=tuple(gates))


def _precision(latency: Sequence[LatencyResult]) -> list[str]:
    """What the precision adds: the smallest total gain over the unpruned fp32 engine, and where it gains nothing."""
    facts = []
    totals = [(one.gain(one.shipped, "base"), one) for one in latency if one.precision != "fp32"]
    if totals:
        total, one = min(totals, key=lambda pair: pair[0].ci_low)
        facts.append(
            f"{total.median:.2f}x faster than the unpruned fp32 engine at batch {one.batch} "
            f"(95 % interval {total.ci_low:.2f} to {total.ci_high:.2f})"
        )
    for one in latency:
        if not one.precision_wins:
            gain = one.gain(one.shipped, "pruned")
            facts.append(
                f"{one.precision} does not win over fp32 at batch {one.batch} on {one.target} "
                f"({gain.median:.2f}x, 95 % interval {gain.ci_low:.2f} to {gain.ci_high:.2f})"
            )
    return facts


def _miss(gate: GateResult) -> str:
    measured = "not evaluated" if gate.measured is None else f"measured {gate.measured:.4g}"
    return f"{gate.name} (required {gate.condition}, {measured})"
