"""Many engines in one process: what one saves is a share that a slow machine does not change; budgets as gates."""

from __future__ import annotations

import numpy as np
import pytest

from optin_export.measure import Interleaved, Measured, ParityCase, interleave, judge, latency, median_call
from optin_export.progress import reporting
from optin_export.recipe import Budget, Gates
from tests.measure.test_measure import FakeEngine, clock, measured  # noqa: F401

BUDGET = {"target": "t", "batch": 2}
GOOD = (ParityCase("t", "base", 1, "distinct", 1e-6, 0.0, True),)


def slowed(seed: int, **milliseconds: float) -> Interleaved:
    """Blocks on a machine that is up to three times slower for whole blocks, and 1 % noise."""
    generator = np.random.default_rng(seed)
    speed = generator.uniform(1.0, 3.0, 20)
    samples = {
        name: [(value * factor * generator.normal(1.0, 0.01, 9)).tolist() for factor in speed]
        for name, value in milliseconds.items()
    }
    return Interleaved(samples, seed=0)


@pytest.mark.parametrize("seed", range(5))
def test_what_is_saved_does_not_depend_on_the_machines_mood(seed: int) -> None:
    saved = slowed(seed, base=10.0, small=7.0).saved("small", "base", "base")
    assert saved.low <= saved.median <= saved.high
    assert saved.median == pytest.approx(0.3, abs=0.01) and saved.high - saved.low < 0.03


def test_a_share_can_be_of_another_engine() -> None:
    """Where tokens are merged, units save from the merged model, in shares of the unmerged one."""
    saved = slowed(0, base=10.0, full=8.0, small=7.0).saved("small", "full", "base")
    assert saved.median == pytest.approx(0.1, abs=0.01)


def test_the_median_call_has_the_interval_of_its_blocks() -> None:
    one = median_call([[1.0, 1.0, 1.0]] * 10)
    assert one.low == one.median == one.high == 1.0
    two = median_call([[1.0] * 3] * 5 + [[2.0] * 3] * 5)
    assert two.low == 1.0 and two.high == 2.0


def test_all_engines_run_in_every_block(clock: np.random.Generator) -> None:  # noqa: F811
    built = {name: FakeEngine(ms=ms) for name, ms in (("base", 50.0), ("a", 40.0), ("b", 20.0))}
    seen: list[tuple[int, int]] = []
    with reporting(lambda *step: seen.append(step)):
        found = interleave(built, {"x": np.ones(2)}, blocks=7, seed=0)
    assert {name: len(blocks) for name, blocks in found.samples.items()} == dict.fromkeys(built, 7)
    assert seen[-1] == (7, 7)
    assert found.median("b").median == pytest.approx(20.0, rel=0.05)
    assert found.saved("a", "base", "base").median == pytest.approx(0.2, abs=0.03)
    assert len(interleave(built, {"x": np.ones(2)}, blocks=999, seed=0).samples["a"]) == latency.BLOCKS


def gate(budget: Budget, **changes: object) -> dict[str, object]:
    values = {"parity": GOOD, "accuracy": None, "latency": (measured(20.0, 10.0),), **changes}
    found = judge(Gates(), budget, None, Measured(**values), promised=2.0)  # type: ignore[arg-type]
    (one,) = [one for one in found if one.name.startswith("budget.")]
    return one.to_json()


def test_a_budget_of_speedup_is_judged_by_the_lower_end(clock: np.random.Generator) -> None:  # noqa: F811
    one = measured(20.0, 10.0)
    found = gate(Budget(speedup=1.9, **BUDGET), latency=(one,))
    assert found["name"] == "budget.speedup" and found["passed"] and "promised 2" in str(found["note"])
    assert found["measured"] == one.speedup.ci_low
    assert not gate(Budget(speedup=one.speedup.median, **BUDGET), latency=(one,))["passed"]


def test_a_budget_of_latency_is_judged_by_the_upper_end(clock: np.random.Generator) -> None:  # noqa: F811
    one = measured(20.0, 10.0)
    assert gate(Budget(latency_ms=10.5, **BUDGET), latency=(one,))["passed"]
    found = gate(Budget(latency_ms=one.pruned_ms.p50, **BUDGET), latency=(one,))
    assert not found["passed"] and found["measured"] > one.pruned_ms.p50  # type: ignore[operator]


def test_a_budget_of_another_batch_size_or_unmeasured_target_is_not_met(clock: np.random.Generator) -> None:  # noqa: F811
    assert not gate(Budget(speedup=1.1, target="t", batch=3))["passed"]
    missing = gate(Budget(speedup=1.1, target="gpu", batch=2), unmeasured={"gpu": "no driver"})
    assert missing["measured"] is None and not missing["passed"] and "no driver" in str(missing["note"])
