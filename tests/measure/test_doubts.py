"""A number that there is reason to doubt is told with its reason, and does not pass a gate."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from optin_export.measure import Accuracy, Gate, Latency, Measured, ParityCase, doubts, judge, latency
from optin_export.measure.latency import Quantiles, Speedup
from optin_export.measure.neighbours import Neighbours
from optin_export.recipe import Budget, Gates
from optin_export.report.compose import make_verdict
from optin_export.report.schema import AccuracyResult, GateResult, LatencyResult, Size

QUIET = Latency(
    target="onnxruntime-cpu-1t",
    batch=8,
    sequence=None,
    base_ms=Quantiles(2.0, 2.0, 2.0),
    pruned_ms=Quantiles(1.0, 1.0, 1.0),
    speedup=Speedup(2.0, 1.9, 2.1),
    noise_floor=0.01,
    blocks=24,
    samples={"pruned": [[1.0, 1.1]] * 24},
    rounds=tuple(number // 3 for number in range(24)),
    neighbours=Neighbours(others=0.02, stolen=0.01),
    by={"p90": Speedup(2.0, 1.7, 2.3), "cpu": Speedup(1.95, 1.9, 2.0)},
)
BUSY = replace(QUIET, neighbours=Neighbours(others=0.5, stolen=0.02))
PARITY = ParityCase("onnxruntime-cpu-1t", "base", 8, "distinct", 1e-6, 0.0, True)


def gate(one: Latency, gates: Gates, macs: float = 0.5, budget: Budget | None = None, name: str = "speedup") -> Gate:
    found = judge(gates, budget or Budget(macs=0.5), 0.5, Measured((PARITY,), None, (one,)), macs=macs)
    return next(gate for gate in found if gate.name == name)


def verdict(one: Latency, gates: Gates, accuracy: Accuracy | None = None, macs: float = 0.5) -> Any:
    judged = judge(gates, Budget(macs=0.5), 0.5, Measured((PARITY,), accuracy, (one,)), macs=macs)
    row = LatencyResult(
        **{name: value for name, value in one.to_json().items() if name not in ("samples", "clocks", "rounds")},
        clock=one.clock,
    )
    return make_verdict(
        [GateResult(**gate.to_json()) for gate in judged],
        Size(base=100, pruned=int(100 * macs), ratio=macs),
        AccuracyResult(**accuracy.to_json()) if accuracy else None,
        [row],
        None,
        doubts([one], macs, gates.most_other_work),
    )


def test_on_a_busy_machine_speed_is_not_evaluated() -> None:
    assert gate(QUIET, Gates(speedup=1.5)).passed
    found = gate(BUSY, Gates(speedup=1.5))
    assert (found.measured, found.passed, found.kind) == (None, False, "gate")
    assert found.note.startswith("not evaluated: other work took 52% of the CPU time")
    assert gate(BUSY, Gates(speedup=1.5, other_work=0.6)).passed  # the recipe says how much is allowed
    assert not gate(BUSY, Gates(speedup=1.5, other_work=0.51)).passed
    where: dict[str, Any] = {"target": "onnxruntime-cpu-1t", "batch": 8}
    for budget in (Budget(speedup=1.5, **where), Budget(latency_ms=2.0, **where)):
        name = f"budget.{'speedup' if budget.speedup else 'latency_ms'}"
        assert gate(QUIET, Gates(), budget=budget, name=name).passed
        assert gate(BUSY, Gates(), budget=budget, name=name).measured is None


def test_a_quick_measurement_is_told_wherever_its_number_is() -> None:
    quick = replace(QUIET, blocks=6, samples={"pruned": [[1.0, 1.1]] * 6}, rounds=(0, 0, 0, 1, 1, 1))
    assert not QUIET.quick and quick.quick
    found = gate(quick, Gates(speedup=1.5))
    assert found.passed and found.note.endswith("batch 8 on onnxruntime-cpu-1t, quick: only 6 blocks)")
    budget = Budget(latency_ms=2.0, target="onnxruntime-cpu-1t", batch=8)
    assert "quick: only 6 blocks" in gate(quick, Gates(), budget=budget, name="budget.latency_ms").note
    assert verdict(quick, Gates(speedup=1.5)).summary.startswith("PASSED, with 1 warning (quick measurement): 2.00x")
    (told,) = doubts([quick], 0.5, 0.1)
    assert "6 blocks" in told.text and "without --quick" in told.text
    assert doubts([replace(quick, judged=False)], 0.5, 0.1) == []


def test_the_verdict_names_its_warnings_in_its_own_line() -> None:
    allowed = verdict(BUSY, Gates(speedup=1.5, other_work=0.6))
    assert allowed.passed and doubts([BUSY], 0.5, 0.6) == []  # what the recipe allows is no doubt
    failed = verdict(BUSY, Gates(speedup=1.5))
    assert failed.outcome == "NOT EVALUATED" and not failed.passed
    assert failed.summary.startswith("NOT EVALUATED, with 1 warning (other work took 52% of the CPU time): ")
    assert "not evaluated: speedup (required >= 1.5)" in failed.summary
    ungated = verdict(BUSY, Gates())
    assert ungated.summary.startswith("PASSED, with 1 warning (other work took 52% of the CPU time): ")
    missed = verdict(QUIET, Gates(speedup=3.0))
    assert missed.outcome == "FAILED" and "missed: speedup (required >= 3, measured 1.9)" in missed.summary
    assert verdict(QUIET, Gates(speedup=1.5)).summary.startswith("PASSED: 2.00x faster at batch 8")


@pytest.mark.parametrize("clock", ["p90", "cpu"])
def test_the_lower_of_two_clocks_that_disagree_is_judged(clock: str) -> None:
    one = replace(QUIET, by={**QUIET.by, clock: Speedup(1.4, 1.3, 1.5)})
    assert one.clock == clock and one.judged_speedup.ci_low == 1.3
    assert not gate(one, Gates(speedup=1.5)).passed and gate(one, Gates(speedup=1.5)).measured == 1.3
    assert gate(one, Gates(speedup=1.25)).passed
    said = verdict(one, Gates(speedup=1.25)).summary
    assert said.startswith("PASSED, with 1 warning") and "1.40x faster" in said and "2.00x" in said
    # Intervals that meet, and clocks that show more, change nothing.
    for other in (Speedup(1.7, 1.3, 1.95), Speedup(3.0, 2.9, 3.1), Speedup(1.97, 1.96, 1.98)):
        assert replace(QUIET, by={clock: other}).clock == "p50"
    assert replace(QUIET, speedup=Speedup(2.0, 1.99, 2.01), by={clock: Speedup(1.97, 1.96, 1.98)}).clock == "p50"


def test_more_than_the_macs_explain_is_doubted() -> None:
    assert doubts([QUIET], 0.6, 0.1) == []
    one = doubts([QUIET], 0.7, 0.1)
    assert len(one) == 1 and one[0].short == "2.00x is more than 70% of the MACs explain"
    fast = replace(BUSY, speedup=Speedup(31.0, 29.0, 32.0), by={})
    assert gate(fast, Gates(speedup=1.5, other_work=0.9), macs=0.3).measured is None
    assert gate(replace(fast, speedup=Speedup(3.0, 2.9, 3.1)), Gates(speedup=1.5, other_work=0.9), macs=0.3).passed


def test_a_difference_whose_interval_holds_none_is_called_none() -> None:
    for base, pruned, low, high, words in (
        (93.5, 94.0, -1.75, 0.75, "no measurable difference in accuracy (93.50 to 94.00"),
        (94.0, 93.5, 0.1, 0.9, "0.50 points of accuracy lost (94.00 to 93.50"),
        (93.5, 94.0, -0.9, -0.1, "0.50 points of accuracy gained (93.50 to 94.00"),
    ):
        accuracy = Accuracy("accuracy", 400, base, pruned, base - pruned, low, high)
        assert words in verdict(QUIET, Gates(), accuracy).summary
    none = replace(QUIET, speedup=Speedup(1.02, 0.97, 1.06))
    assert "no measurable difference in speed (1.02x)" in verdict(none, Gates()).summary


def test_the_accuracy_is_judged_by_the_loss_or_by_the_end_of_its_interval() -> None:
    accuracy = Accuracy("accuracy", 400, 94.0, 93.6, 0.4, -0.8, 1.6)

    def passed(**gates: float) -> dict[str, bool]:
        found = judge(Gates(**gates), Budget(macs=0.5), 0.5, Measured((PARITY,), accuracy, ()))
        return {gate.name: gate.passed for gate in found if gate.name.startswith("accuracy")}

    assert passed(accuracy_drop=0.5) == {"accuracy_drop": True}
    assert passed(accuracy_drop=0.3, accuracy_drop_high=1.7) == {"accuracy_drop": False, "accuracy_drop_high": True}
    assert passed(accuracy_drop_high=1.5) == {"accuracy_drop_high": False}


def test_a_target_that_cannot_run_here_is_not_evaluated_and_no_failed_parity() -> None:
    missing = {"tensorrt-rtx-cuda": "no GPU"}
    for cases, kind, word in (
        ((), "gate", "NOT EVALUATED"),
        ((PARITY,), "gate", "NOT EVALUATED"),
        ((replace(PARITY, max_error=1.0, passed=False),), "parity", "FAILED"),
    ):
        gates = judge(Gates(), Budget(macs=0.5), 0.5, Measured(cases, None, (), missing))
        parity = next(gate for gate in gates if gate.name == "parity")
        assert (parity.kind, parity.passed) == (kind, False) and "no GPU" in parity.note
        results = [GateResult(**gate.to_json()) for gate in gates]
        assert make_verdict(results, Size(base=2, pruned=1, ratio=0.5), None, []).outcome == word


class Instance:
    """A loaded engine with a state of its own."""

    inputs, outputs = ("x",), ("y",)

    def __init__(self, ms: float) -> None:
        self.ms = ms

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"y": inputs["x"]}


def timed(monkeypatch: pytest.MonkeyPatch, base: Callable[[], Instance], pruned: Callable[[], Instance]) -> Latency:
    generator = np.random.default_rng(0)

    def timer_of(engine: Instance, inputs: Any, mode: str) -> Callable[[], float]:
        return lambda: engine.ms * float(generator.normal(1.0, 0.001))

    monkeypatch.setattr(latency, "timer_of", timer_of)
    for name in ("WARM_UP_SECONDS", "PAUSE_SECONDS"):
        monkeypatch.setattr(latency, name, 0.0)
    return latency.measure_latency(base, pruned, {"x": np.ones(2)}, latency.LatencySettings("t", 2, None, 0))


def test_the_noise_floor_is_between_two_loaded_instances(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of two loaded copies is 10 % slower in every block: calls alone would show a floor of nearly nothing."""
    monkeypatch.setattr(latency.Watch, "seen", lambda watch: None)
    states = itertools.cycle([20.0, 22.0])
    restless = timed(monkeypatch, lambda: Instance(next(states)), lambda: Instance(10.0))
    assert restless.noise_floor > 0.08
    alike = timed(monkeypatch, lambda: Instance(20.0), lambda: Instance(10.0))
    assert alike.noise_floor < 0.002
    # The far end of its interval, not its middle: here the two are alike on average and differ in every round.
    turns = itertools.cycle([20.0, 22.0, 22.0, 20.0])
    assert timed(monkeypatch, lambda: Instance(next(turns)), lambda: Instance(10.0)).noise_floor > 0.05


def test_engines_are_loaded_again_for_every_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency.Watch, "seen", lambda watch: None)
    loaded: list[float] = []

    def load(ms: float) -> Callable[[], Instance]:
        return lambda: loaded.append(ms) or Instance(ms)  # type: ignore[func-returns-value]

    found = timed(monkeypatch, load(20.0), load(10.0))
    rounds = len(set(found.rounds))
    assert rounds == latency.BLOCKS // latency.PER_ROUND and found.rounds == tuple(sorted(found.rounds))
    assert (loaded.count(20.0), loaded.count(10.0)) == (2 * rounds, rounds)


def test_a_busy_machine_is_measured_again_and_the_quietest_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(*shares: float) -> Latency:
        seen = iter(shares)
        monkeypatch.setattr(latency.Watch, "seen", lambda watch: Neighbours(others=next(seen), stolen=0.0))
        return timed(monkeypatch, lambda: Instance(20.0), lambda: Instance(10.0))

    assert measured(0.05).attempts == 1
    again = measured(0.4, 0.05)
    assert again.attempts == 2 and again.neighbours == Neighbours(others=0.05, stolen=0.0)
    never = measured(0.4, 0.3, 0.5)
    assert never.attempts == 3 and never.neighbours == Neighbours(others=0.3, stolen=0.0)


def test_cpu_time_is_counted_beside_the_wall_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wall clock that is stopped while the pruned engine runs shows any speedup; CPU time shows the work."""
    monkeypatch.setattr(latency.Watch, "seen", lambda watch: None)
    spent = itertools.count(step=3_000_000)
    monkeypatch.setattr(latency.time, "process_time_ns", lambda: next(spent))
    found = timed(monkeypatch, lambda: Instance(20.0), lambda: Instance(1.0))
    assert found.speedup.median == pytest.approx(20.0, rel=0.01)
    base, again, pruned = (len(found.samples[name][0]) for name in ("base", "again", "pruned"))
    # 3 ms of CPU time for each block of any arm, whatever the wall clock says.
    assert found.by["cpu"].median == pytest.approx(pruned / (base * again) ** 0.5)
    assert Latency.from_json(found.to_json()) == found
