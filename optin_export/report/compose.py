"""Compose the report from the stages' results, with the verdict in one sentence."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from optin_export.measure import TOLERANCES, Doubt, Gate, Measured
from optin_export.measure.doubts import CLOCKS
from optin_export.measure.gpu import ranges
from optin_export.repair import Repair
from optin_export.repair.gauss_newton import OUTPUT
from optin_export.repair.sequential import HEAD
from optin_export.report.headline import accuracy_change
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
    SpeedupResult,
    StageResult,
    ToleranceResult,
    Verdict,
)
from optin_export.search import Plan
from optin_export.units import DIMENSIONS, Structure


def compose(
    *,
    gates: Iterable[Gate],
    macs: Size,
    params: Size,
    measured: Measured,
    engines: Sequence[EngineResult],
    stages: Sequence[StageResult],
    doubts: Sequence[Doubt] = (),
    warnings: Sequence[str] = (),
    **rest: Any,
) -> Report:
    """A Report from typed results; `rest` holds its other fields (name, model, pruning, environment).

    doubts: reservations about the measurements, shown next to the verdict and in full among the warnings.
    """
    accuracy, latency = accuracy_result(measured), latency_results(measured)
    return Report(
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        verdict=make_verdict(
            [GateResult(**gate.to_json()) for gate in gates],
            macs,
            accuracy,
            latency,
            rest["pruning"].finetuned,
            doubts,
            len(warnings),
        ),
        macs=macs,
        params=params,
        accuracy=accuracy,
        parity=parity_of(measured),
        latency=latency,
        quick=any(one.quick and one.judged for one in measured.latency),
        engines=tuple(engines),
        stages=tuple(stages),
        warnings=(*(doubt.text for doubt in doubts), *warnings),
        **rest,
    )


def accuracy_result(measured: Measured) -> AccuracyResult | None:
    return AccuracyResult(**measured.accuracy.to_json()) if measured.accuracy else None


def latency_results(measured: Measured) -> tuple[LatencyResult, ...]:
    """Latency results without single calls, and with only the minimum and maximum of the GPU's readings."""
    return tuple(
        LatencyResult(
            **{name: value for name, value in one.to_json().items() if name not in ("samples", "clocks", "rounds")},
            clock=one.clock,
            clocks=ranges(one.clocks),
        )
        for one in measured.latency
    )


def chance_warnings(measured: Measured) -> list[str]:
    """A warning if the unpruned model is not significantly better than guessing."""
    return [measured.accuracy.warning] if measured.accuracy and measured.accuracy.warning else []


def parity_of(measured: Measured) -> Parity:
    cases = tuple(ParityResult(**case.to_json()) for case in measured.parity)
    return Parity(
        passed=all(case.passed for case in cases),
        tolerance=max(
            (case.limit for case in measured.parity if case.precision == "fp32"), default=TOLERANCES["fp32"].error
        ),
        max_error=max((case.max_error for case in cases if case.precision == "fp32"), default=0.0),
        tolerances={
            name: ToleranceResult(**asdict(TOLERANCES[name]))
            for name in dict.fromkeys(case.precision for case in cases)
        },
        cases=cases,
    )


def prunings(
    structure: Structure, plan: Plan, scores: Mapping[str, np.ndarray], repairs: Mapping[str, Repair]
) -> tuple[GroupResult, ...]:
    """The removed units of each group, with the share of the group's score that stays and the repair's errors."""
    results = []
    for group in structure.groups:
        kept = list(plan.groups[group.key].kept)
        total = float(scores[group.key].sum())
        repair = repairs.get(group.key)
        results.append(
            GroupResult(
                block=group.block,
                kind=group.kind + group.part,
                count=group.count,
                kept=len(kept),
                score_kept=float(scores[group.key][kept].sum()) / total if total > 0 else 1.0,
                **({} if repair is None else _errors(repair)),
            )
        )
    # Dimensions of queries and keys have no scores: the search knows them by their loss curves alone.
    for one in structure.attentions if plan.dimensions else ():
        left = plan.dimensions.get(one.name, one.count)
        results.append(
            GroupResult(block=one.block, kind=f"query/key {DIMENSIONS}", count=one.count, kept=left, score_kept=None)
        )
    return tuple(results)


def head_repair(repairs: Mapping[str, Repair]) -> HeadRepair | None:
    """The output layer's repair, if there was one."""
    repair = repairs.get(HEAD)
    return None if repair is None else HeadRepair(**_errors(repair))


def _errors(repair: Repair) -> dict[str, Any]:
    found = asdict(repair)
    return {"error_before": found.pop("before"), "error_after": found.pop("after"), **found}


def output_refit(repairs: Mapping[str, Repair]) -> OutputRefit | None:
    """The result of Gauss-Newton, if the recipe asks for it."""
    repair = repairs.get(OUTPUT)
    return None if repair is None else OutputRefit(**asdict(repair))


def make_verdict(
    gates: Sequence[GateResult],
    macs: Size,
    accuracy: AccuracyResult | None,
    latency: Sequence[LatencyResult],
    finetuned: FineTuned | None = None,
    doubts: Sequence[Doubt] = (),
    warnings: int = 0,
) -> Verdict:
    """The verdict and its sentence: the gain, its cost, whether the model was trained, and missed gates.

    doubts: shown next to the first word. warnings: number of other warnings.
    """
    facts = []
    judged = [one for one in latency if one.judged]
    if judged:
        slowest = min(judged, key=lambda one: one.judged_speedup.ci_low)
        speedup = slowest.judged_speedup
        among = ", the smallest gain measured" if len(judged) > 1 else ""
        alike = "" if slowest.precision == "fp32" else f" than the unpruned {slowest.precision} engine"
        facts.append(
            f"{_faster(speedup)}{alike} at batch {slowest.batch} on {slowest.target} "
            f"(95 % interval {speedup.ci_low:.2f} to {speedup.ci_high:.2f}{_clock(slowest)}{among})"
        )
        facts += _precision(latency)
    if accuracy is not None:
        facts.append(accuracy_change(accuracy))
    facts.append(f"{macs.ratio:.1%} of the MACs left")
    if finetuned is not None and finetuned.note is None:
        how = (
            "repaired by distillation on your unlabelled rows"
            if finetuned.by == "distill"
            else f"fine-tuned by {finetuned.by}"
        )
        facts.append(how + (f" for {finetuned.steps} steps" if finetuned.steps else ""))
    missed = [gate for gate in gates if not gate.passed and gate.measured is not None]
    unknown = [gate for gate in gates if not gate.passed and gate.measured is None]
    if missed:
        facts.append("missed: " + ", ".join(_miss(gate) for gate in missed))
    if unknown:
        facts.append("not evaluated: " + ", ".join(f"{gate.name} (required {gate.condition})" for gate in unknown))
    verdict = Verdict(passed=not missed and not unknown, summary="", gates=tuple(gates))
    summary = f"{verdict.outcome}{_with_warnings(doubts, warnings)}: {'; '.join(facts)}."
    return verdict.model_copy(update={"summary": summary})


def _with_warnings(doubts: Sequence[Doubt], others: int) -> str:
    """', with 2 warnings (other work took 62% of the CPU time)'; empty without warnings."""
    count = len(doubts) + others
    named = "; ".join(dict.fromkeys(doubt.short for doubt in doubts))
    return f", with {count} warning{'s' if count > 1 else ''}{f' ({named})' if named else ''}" if count else ""


def _faster(speedup: SpeedupResult) -> str:
    if speedup.ci_low <= 1 <= speedup.ci_high:
        return f"no measurable difference in speed ({speedup.median:.2f}x)"
    return f"{speedup.median:.2f}x faster" if speedup.median >= 1 else f"{1 / speedup.median:.2f}x SLOWER"


def _clock(one: LatencyResult) -> str:
    """The clock of the speedup, if it is not the default one."""
    return "" if one.clock == "p50" else f" by {CLOCKS[one.clock]}, {one.speedup.median:.2f}x by {CLOCKS['p50']}"


def _precision(latency: Sequence[LatencyResult]) -> list[str]:
    """The precision's effect: the smallest total gain over the unpruned fp32 engine, and where it gains nothing."""
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
    return f"{gate.name} (required {gate.condition}, measured {gate.measured:.4g})"
