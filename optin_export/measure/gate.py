"""The gate: what was required against what was measured. It can fail, and an unmeasured gate never passes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from optin_export.measure.interleaved import median_call
from optin_export.measure.parity import TOLERANCES, ParityCase
from optin_export.recipe import Budget, Gates, engine_name

if TYPE_CHECKING:
    from optin_export.measure import Accuracy, Measured


@dataclass(frozen=True)
class Gate:
    """One requirement: `measured` in `relation` to `required`; kind tells the exit code.

    measured: None if it could not be evaluated; then it has not passed.
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
    gates: Gates, budget: Budget, spent: float | None, measured: Measured, promised: float | None = None
) -> list[Gate]:
    """All gates of a run. spent: the measured fraction of the budget's cost, where that is MACs or parameters.
    promised: by the latency table, where that is speedup or latency.

    The speedup gate takes the lower end of the 95 % interval at the worst shipped batch size and target, because that
    is what a user of that batch size gets.
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
        verdicts.append(_clocked(budget, measured, promised))
    elif budget.accuracy_drop is None:
        assert spent is not None
        note = f"share of the unpruned model's {budget.kind} that the pruned model has, counted on the rebuilt model"
        kept = spent <= budget.fraction + 1e-9
        verdicts.append(Gate(f"budget.{budget.kind}", "gate", "<=", budget.fraction, spent, kept, note))
    else:
        verdicts.append(_drop("budget.accuracy_drop", budget.accuracy_drop, accuracy, ", unseen by the search"))
    if gates.speedup is not None:
        slowest = min(latency, key=lambda one: one.speedup.ci_low, default=None)
        low = slowest.speedup.ci_low if slowest else None
        where = f"batch {slowest.batch} on {slowest.target}" if slowest else "not evaluated: nothing was measured"
        passed = low is not None and low >= gates.speedup and not missing
        alike = f", both in {slowest.precision}" if slowest and slowest.precision != "fp32" else ""
        note = f"lower end of the 95 % interval at the slowest gain ({where}{alike})" + unseen
        verdicts.append(Gate("speedup", "gate", ">=", gates.speedup, low, passed, note))
    if gates.accuracy_drop is not None:
        verdicts.append(_drop("accuracy_drop", gates.accuracy_drop, accuracy))
    return verdicts


def _clocked(budget: Budget, measured: Measured, promised: float | None) -> Gate:
    """A budget of speedup or latency, on the final engines: by the end of the interval that favours it least."""
    wanted = budget.target, budget.batch
    one = next((one for one in measured.latency if one.judged and (one.target, one.batch) == wanted), None)
    where = f"batch {budget.batch} on {budget.target}"
    missing = measured.unmeasured.get(budget.target or "", "nothing was measured")
    unseen = f"not evaluated on {where}: {missing}"
    table = "" if promised is None else f"; the latency table promised {promised:.3g}"
    if budget.speedup is not None:
        low = None if one is None else one.speedup.ci_low
        note = unseen if one is None else f"lower end of the 95 % interval at {where}{table}"
        passed = low is not None and low >= budget.speedup
        return Gate("budget.speedup", "gate", ">=", budget.speedup, low, passed, note)
    assert budget.latency_ms is not None
    high = None if one is None else median_call(one.samples[engine_name("pruned", one.precision)]).high
    note = unseen if one is None else f"upper end of the 95 % interval of one call's median at {where}, in ms{table}"
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
    return Gate(
        "parity" if precision == "fp32" else f"parity.{precision}",
        # Engines that did not run have not computed anything wrong.
        "parity" if cases or not missing else "gate",
        "<=",
        tolerance.error,
        max((max(case.max_error, case.spread) for case in cases), default=None),
        bool(cases) and all(case.passed for case in cases) and not missing,
        note + unseen,
    )


def _drop(name: str, limit: float, accuracy: Accuracy | None, which: str = "") -> Gate:
    drop = accuracy.drop if accuracy else None
    note = (
        f"points of {accuracy.metric}, engine against engine on {accuracy.rows} rows{which} "
        f"(95 % interval {accuracy.drop_low:+.2f} to {accuracy.drop_high:+.2f})"
        if accuracy
        else "not evaluated: no evaluation data, or no engine that runs here"
    )
    return Gate(name, "gate", "<=", limit, drop, drop is not None and drop <= limit, note)
