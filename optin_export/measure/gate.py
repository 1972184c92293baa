"""Gates: compare requirements with measurements. An unmeasured gate never passes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from optin_export.measure.doubts import CLOCKS, is_busy, is_implausible
from optin_export.measure.latency import Latency
from optin_export.measure.parity import ROUNDINGS, TOLERANCES, ParityCase
from optin_export.measure.rounds import latency_of
from optin_export.recipe import Budget, Gates, engine_name

if TYPE_CHECKING:
    from optin_export.measure import Accuracy, Measured


@dataclass(frozen=True)
class Gate:
    """One requirement: `measured` in `relation` to `required`; kind decides the exit code.

    measured: None if it could not be evaluated, with the reason in `note`; then it has not passed.
    """

    name: str
    kind: Literal["parity", "gate"]
    relation: Literal[">=", "<="]
    required: float
    measured: float | None
    passed: bool
    note: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def judge(
    gates: Gates,
    budget: Budget,
    spent: float | None,
    measured: Measured,
    promised: float | None = None,
    macs: float = 0.0,
) -> list[Gate]:
    """All gates of a run.

    The speedup gate takes the lower end of the 95 % interval at the worst shipped batch size and target, because that
    is what a user of that batch size gets; by wall-clock medians, or by a clock that is significantly lower. Gates on
    a measurement that other work disturbed are not evaluated.

    Args:
        spent: the measured fraction of the budget's cost, if that is MACs or parameters.
        promised: the latency table's prediction, if the budget is speedup or latency.
        macs: remaining share of the unpruned model's MACs; 0: unknown.
    """
    parity, accuracy = measured.parity, measured.accuracy
    latency = [one for one in measured.latency if one.judged]
    missing = ", ".join(f"{name}: {reason}" for name, reason in measured.unmeasured.items())
    unseen = f"; not evaluated on {missing}" if missing else ""
    verdicts = [
        _parity(precision, [case for case in parity if case.precision == precision], missing, unseen)
        for precision in dict.fromkeys(("fp32", *(case.precision for case in parity)))
    ]
    if budget.kind == "latency":
        verdicts.append(_clocked(budget, gates, measured, promised, macs))
    elif budget.accuracy_drop is None:
        assert spent is not None
        note = f"share of the unpruned model's {budget.kind} that the pruned model has, counted on the rebuilt model"
        kept = spent <= budget.fraction + 1e-9
        verdicts.append(Gate(f"budget.{budget.kind}", "gate", "<=", budget.fraction, spent, kept, note))
    else:
        verdicts.append(_drop("budget.accuracy_drop", budget.accuracy_drop, accuracy, ", unseen by the search"))
    if gates.speedup is not None:
        verdicts.append(_speedup(gates, latency, missing, unseen, macs))
    if gates.accuracy_drop is not None:
        verdicts.append(_drop("accuracy_drop", gates.accuracy_drop, accuracy))
    if gates.accuracy_drop_high is not None:
        verdicts.append(_drop("accuracy_drop_high", gates.accuracy_drop_high, accuracy))
    return verdicts


def _speedup(gates: Gates, latency: Sequence[Latency], missing: str, unseen: str, macs: float) -> Gate:
    assert gates.speedup is not None
    slowest = min(latency, key=lambda one: one.judged_speedup.ci_low, default=None)
    low = slowest.judged_speedup.ci_low if slowest else None
    where = _place(slowest) if slowest else "not evaluated: nothing was measured"
    note = f"lower end of the 95 % interval at the slowest gain ({where})" + unseen
    reason = next((why for one in latency if (why := _disturbed(one, gates, macs))), None)
    if low is not None and (reason or missing):
        note, low = f"{reason or 'not evaluated'} ({low:.3g} was measured at {where}){unseen}", None
    return Gate("speedup", "gate", ">=", gates.speedup, low, low is not None and low >= gates.speedup, note)


def _place(one: Latency) -> str:
    alike = f", both in {one.precision}" if one.precision != "fp32" else ""
    clock = "" if one.clock == "p50" else f", by {CLOCKS[one.clock]}"
    quick = f", quick: only {one.blocks} blocks" if one.quick else ""
    return f"batch {one.batch} on {one.target}{alike}{clock}{quick}"


def _disturbed(one: Latency, gates: Gates, macs: float) -> str | None:
    """The reason why a gate cannot be evaluated on this measurement; None if it can."""
    limit = gates.most_other_work
    if is_busy(one, limit):
        assert one.neighbours is not None
        return (
            f"not evaluated: other work took {one.neighbours.share:.0%} of the CPU time while it was measured, "
            f"{limit:.0%} is allowed (gates.other_work)"
        )
    if one.neighbours is not None and one.neighbours.busy and is_implausible(one.judged_speedup, macs):
        return (
            f"not evaluated: {one.judged_speedup.median:.2f}x with {macs:.0%} of the MACs is not plausible on a "
            "machine that is busy with other work"
        )
    return None


def _clocked(budget: Budget, gates: Gates, measured: Measured, promised: float | None, macs: float) -> Gate:
    """A budget of speedup or latency, on the final engines, by the less favourable end of the interval."""
    wanted = budget.target, budget.batch
    one = next((one for one in measured.latency if one.judged and (one.target, one.batch) == wanted), None)
    where = f"batch {budget.batch} on {budget.target}"
    missing = measured.unmeasured.get(budget.target or "", "nothing was measured")
    reason = f"not evaluated on {where}: {missing}" if one is None else _disturbed(one, gates, macs)
    table = "" if promised is None else f"; the latency table promised {promised:.3g}"
    if budget.speedup is not None:
        low = None if one is None or reason else one.judged_speedup.ci_low
        note = reason or f"lower end of the 95 % interval at {_place(one) if one else where}{table}"
        passed = low is not None and low >= budget.speedup
        return Gate("budget.speedup", "gate", ">=", budget.speedup, low, passed, note)
    assert budget.latency_ms is not None
    high = None
    if one is not None and not reason:
        high = latency_of(one.samples[engine_name("pruned", one.precision)], one.rounds).high
    note = (
        reason
        or f"upper end of the 95 % interval of one call's median at {_place(one) if one else where}, in ms{table}"
    )
    passed = high is not None and high <= budget.latency_ms
    return Gate("budget.latency_ms", "gate", "<=", budget.latency_ms, high, passed, note)


def _parity(precision: str, cases: list[ParityCase], missing: str, unseen: str) -> Gate:
    """The gate 'parity' of the fp32 engines, or 'parity.int8' and so on."""
    note = "largest relative difference between an engine and its torch model, any row and batch size"
    tolerance = TOLERANCES[precision]
    if precision != "fp32":
        choices = [case.agreement for case in cases if case.agreement is not None]
        note += f"; worst cosine {min(case.cosine for case in cases):.4f} (at least {tolerance.cosine:g})"
        if choices:
            note += f", choices that agree {min(choices):.1%} (at least {tolerance.agreement:.0%})"
    wrong = [case.limit for case in cases if not case.passed]
    limit = min(wrong) if wrong else max((case.limit for case in cases), default=tolerance.error)
    if limit > tolerance.error:
        own = max(case.rounding or 0.0 for case in cases)
        note += f"; the model itself rounds by {own:.1g} (fp32 against fp64), an engine may by {ROUNDINGS:g} times that"
    failure = next((f"{case.model} on {case.target} {case.failure}" for case in cases if case.failure), None)
    note = f"the engine {failure}" if failure else note
    worst = max((max(case.max_error, case.spread) for case in cases), default=None)
    right = all(case.passed for case in cases)
    # Engines that did not run have not computed anything wrong: parity is then not evaluated, and has not failed.
    evaluated = bool(cases) and not (right and missing)
    if missing and cases and right:
        note = f"{worst:.2g} is the {note} of those that ran"
    return Gate(
        "parity" if precision == "fp32" else f"parity.{precision}",
        "parity" if evaluated else "gate",
        "<=",
        limit,
        worst if evaluated else None,
        evaluated and right,
        note + unseen,
    )


def _drop(name: str, limit: float, accuracy: Accuracy | None, which: str = "") -> Gate:
    """Points lost; for `accuracy_drop_high`, the upper end of the interval."""
    upper = name == "accuracy_drop_high"
    drop = None if accuracy is None else accuracy.drop_high if upper else accuracy.drop
    note = (
        f"{'upper end of the 95 % interval, ' if upper else ''}points of {accuracy.metric}, engine against engine on "
        f"{accuracy.rows} rows{which} "
        + (
            f"({accuracy.drop:+.2f} was measured)"
            if upper
            else f"(95 % interval {accuracy.drop_low:+.2f} to {accuracy.drop_high:+.2f}, not judged: see "
            "gates.accuracy_drop_high)"
        )
        if accuracy
        else "not evaluated: no evaluation data, or no engine that runs here"
    )
    return Gate(name, "gate", "<=", limit, drop, drop is not None and drop <= limit, note)
