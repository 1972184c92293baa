"""Runs with a budget in time: the table is measured once, plans are built, measured, corrected, and every refusal."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import optin_export
from optin_export import search
from optin_export.cli.dry_run.work import planned_work
from optin_export.errors import EnvironmentLacks, InputError
from optin_export.measure.latency import Latency, Quantiles, Speedup
from optin_export.recipe import Budget, validate
from optin_export.search import LatencyTable, Plan, find_plan
from optin_export.stages import latency_trials
from optin_export.stages.search import TABLE
from optin_export.units import Costs
from tests.conftest import Make
from tests.search.test_table import ALIGN, COSTS, CURVES, SCORES, anchor, table

pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.usefixtures("short_measurement")


def recipe_of(make: Make, budget: dict[str, Any], **sections: Any) -> dict[str, Any]:
    prune = {**make()["prune"], "budget": budget, "allocation": "additive", "compensate": False}
    return make(prune=prune, **sections)


def made_up(costs: Costs) -> LatencyTable:
    """Every group saves 0.05 of 1 ms without units."""
    keys = {key: key for key in costs.units}
    anchors = {key: (anchor(0, 50_000),) for key in keys}
    return table(floor_ns=500_000, floor=dict.fromkeys(keys, 0), units=costs.units, signatures=keys, anchors=anchors)


@pytest.fixture(autouse=True)
def few_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two anchors for each of two signatures: what a sub-layer saves that is gone, and with one step left."""
    monkeypatch.setattr(search, "MOST_ENGINES", 4)


@pytest.mark.parametrize("kind", ["vit_recipe", pytest.param("classifier_recipe", marks=pytest.mark.slow)])
def test_a_run_by_the_clock(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """A limit that every engine meets, and by far: the search goes on until it has nothing new to try."""
    make = request.getfixturevalue(kind)
    report = optin_export.run(recipe_of(make, {"latency_ms": 10_000.0, "batch": 3}), out=tmp_path)
    assert report is not None
    gate = next(gate for gate in report.verdict.gates if gate.name == "budget.latency_ms")
    assert gate.passed and gate.measured is not None and 0 < gate.measured < 10_000
    plan = Plan.model_validate_json((tmp_path / "plan" / "plan.json").read_text())
    found = report.pruning.latency
    assert found is not None and found == plan.latency
    assert (found.target, found.batch) == ("onnxruntime-cpu-1t", 3)
    assert all(one.met for one in found.rounds) and plan.budget == {"latency_ms": 10_000.0}
    assert "Searched by a latency table" in (tmp_path / "report.html").read_text()
    assert not (tmp_path / "plan" / ".trials").exists()  # engines of trials are gone

    one = LatencyTable.model_validate_json((tmp_path / TABLE).read_text())
    assert set(one.units) == set(plan.groups) and one.floor_ns > 0
    # Three blocks of equal shapes: one signature for heads and one for neurons; sub-layers can go.
    assert len(one.anchors) == 2 and all(anchors[0].kept == 0 for anchors in one.anchors.values())
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert TABLE in json.dumps(manifest)


def test_the_table_is_measured_anew_only_where_it_depends_on_the_change(
    tmp_path: Path, vit_recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[int] = []
    chosen: list[float] = []

    def without_engines(one: latency_trials.LatencyTrials, costs: Costs, *given: Any) -> LatencyTable:
        measured.append(one.batch)
        return made_up(costs)

    def unmeasured(one: Any, found: LatencyTable, budget: Budget, plan_of: latency_trials.PlanOf, *given: Any) -> Plan:
        plan = plan_of(budget, found)
        chosen.append(plan.budget["speedup"])
        return plan

    monkeypatch.setattr(latency_trials, "measure_table", without_engines)
    monkeypatch.setattr(latency_trials, "choose", unmeasured)

    def run(budget: dict[str, Any], **sections: Any) -> None:
        optin_export.run(recipe_of(vit_recipe, budget, **sections), out=tmp_path, stop_after="search")

    run({"speedup": 1.2})
    run({"speedup": 1.2})
    assert (measured, chosen) == ([1], [1.2])
    run({"speedup": 1.3})  # another plan, by the same table
    assert (measured, chosen) == ([1], [1.2, 1.3])
    run({"speedup": 1.3, "batch": 3})
    run({"speedup": 1.3, "batch": 3}, targets=[{"engine": "onnxruntime", "threads": 2}])
    assert measured == [1, 3, 3]
    (tmp_path / TABLE).write_text("{}")
    run({"speedup": 1.3, "batch": 3}, targets=[{"engine": "onnxruntime", "threads": 2}])
    assert measured == [1, 3, 3, 3]


@pytest.mark.slow
def test_tokens_that_a_schedule_merges_are_in_the_table(
    tmp_path: Path, vit_recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latency_trials, "ROUNDS", 1)  # what is asked is in the table and the first plan
    recipe = recipe_of(vit_recipe, {"latency_ms": 10_000.0}, tokens={"schedule": [4, 2, 0]})
    optin_export.run(recipe, out=tmp_path, stop_after="surgery")
    one = LatencyTable.model_validate_json((tmp_path / TABLE).read_text())
    assert one.full_ns != one.base_ns
    plan = Plan.model_validate_json((tmp_path / "plan" / "plan.json").read_text())
    assert plan.merged == (4, 2, 0)


class Machine:
    """Stands in for engines: what is saved is `factor` times what the table says, measured to 1 %."""

    def __init__(self, factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
        self.factor, self.measured, self.truth = factor, list[dict[str, int]](), table()
        monkeypatch.setattr(latency_trials, "_measure", self.measure)
        self.trials: Any = SimpleNamespace(
            sources=SimpleNamespace(model=None), load=lambda model, name: None, clear=lambda: None
        )

    def milliseconds(self, kept: dict[str, int]) -> float:
        return (1e6 - self.factor * (1e6 - self.truth.of(kept))) / 1e6

    def measure(self, one: Any, base: Any, plan: Plan, seed: int) -> Latency:
        kept = {key: len(group.kept) for key, group in plan.groups.items()}
        self.measured.append(kept)
        ms = self.milliseconds(kept)
        samples = {"pruned": [[ms * spread] * 3 for spread in np.linspace(0.99, 1.01, 12)]}
        speedup = Speedup(1 / ms, 0.99 / ms, 1.01 / ms)
        quantiles = [Quantiles(value, value, value) for value in (1.0, ms)]
        return Latency("t", 1, None, quantiles[0], quantiles[1], speedup, 0.01, 12, samples)

    def choose(self, budget: Budget) -> Plan:
        def plan_of(budget: Budget, one: LatencyTable) -> Plan:
            return find_plan(SCORES, COSTS, budget, ALIGN, None, CURVES, one)

        return latency_trials.choose(self.trials, self.truth, budget, plan_of, 0)


@pytest.mark.parametrize("budget", [Budget(speedup=1.5), Budget(latency_ms=0.66)], ids=["speedup", "latency_ms"])
@pytest.mark.parametrize("factor", [0.6, 0.7, 0.8])
def test_a_table_that_promises_too_much_is_corrected(
    factor: float, budget: Budget, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(factor, monkeypatch)
    plan = machine.choose(budget)
    found = plan.latency
    assert found is not None and 2 <= len(found.rounds) <= latency_trials.ROUNDS
    assert not found.rounds[0].met and found.rounds[found.chosen].met
    assert found.rounds[1].scale == pytest.approx(factor, rel=0.02)
    kept = {key: len(group.kept) for key, group in plan.groups.items()}
    assert kept == machine.measured[found.chosen]
    assert found.measured_ms == pytest.approx(machine.milliseconds(kept))
    assert found.predicted_ms == pytest.approx(machine.truth.of(kept) / 1e6)  # what the table said before


def test_what_a_modest_table_leaves_is_spent(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(1.5, monkeypatch)
    plan = machine.choose(Budget(speedup=1.5))
    assert plan.latency is not None and plan.predicted_loss is not None
    first = find_plan(SCORES, COSTS, Budget(speedup=1.5), ALIGN, None, CURVES, machine.truth)
    assert first.predicted_loss is not None and plan.predicted_loss < first.predicted_loss
    assert plan.latency.rounds[plan.latency.chosen].met


def test_a_budget_that_no_engine_meets_ends_with_the_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(0.2, monkeypatch)
    found = machine.choose(Budget(speedup=2.0)).latency
    assert found is not None and not any(one.met for one in found.rounds)
    assert found.measured_ms == min(one.measured_ms for one in found.rounds)


def test_the_fastest_plan_is_not_searched_beyond(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="no plan meets the budget speedup: 9"):
        Machine(1.0, monkeypatch).choose(Budget(speedup=9.0))


def test_an_unreachable_budget_ends_the_run_with_what_is_possible(
    tmp_path: Path, vit_recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latency_trials, "measure_table", lambda one, costs, *given: made_up(costs))
    with pytest.raises(InputError, match=r"no plan meets the budget speedup: 2.1") as error:
        optin_export.run(recipe_of(vit_recipe, {"speedup": 2.1}), out=tmp_path)
    assert "2.00x as fast" in error.value.why and error.value.exit_code == 2
    assert not (tmp_path / "plan" / "plan.json").exists()


def test_a_target_that_does_not_run_here_is_refused_before_any_work(
    tmp_path: Path, vit_recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    from optin_export import engines

    monkeypatch.setattr(engines, "unavailable", lambda target: "no GPU")
    with pytest.raises(EnvironmentLacks, match="onnxruntime-cpu-1t") as error:
        optin_export.run(recipe_of(vit_recipe, {"speedup": 1.5}), out=tmp_path / "run")
    assert error.value.exit_code == 5 and error.value.why == "no GPU"
    assert not (tmp_path / "run" / "recipe.yaml").exists()


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({"speedup": 0.9}, "greater than or equal to 1"),
        ({"latency_ms": 0.0}, "greater than 0"),
        ({"speedup": 1.5, "macs": 0.5}, "exactly one of"),
        ({"speedup": 1.5, "latency_ms": 2.0}, "exactly one of"),
        ({"macs": 0.5, "batch": 1}, "belong to speedup and latency_ms"),
        (
            {"speedup": 1.5, "target": "tensorrt-cuda"},
            "no target is named 'tensorrt-cuda'; there is onnxruntime-cpu-1t",
        ),
        ({"speedup": 1.5, "batch": 64}, "batch size 64 is not shipped; export.batch has 1, 3"),
    ],
)
def test_budgets_in_time_that_cannot_be(budget: dict[str, Any], message: str, vit_recipe: Make, tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        validate(recipe_of(vit_recipe, budget), tmp_path)
    assert message in error.value.why


def test_tokens_are_not_shared_out_by_the_clock(vit_recipe: Make, tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        validate(recipe_of(vit_recipe, {"speedup": 1.5}, tokens={"keep": "auto"}), tmp_path)
    assert "needs a budget of MACs" in error.value.why


def test_the_first_target_and_batch_are_meant_if_none_is_named(vit_recipe: Make, tmp_path: Path) -> None:
    targets = [{"threads": 2}, {"threads": 1}]
    recipe = validate(recipe_of(vit_recipe, {"speedup": 1.5}, targets=targets), tmp_path)
    assert (recipe.budget.target, recipe.budget.batch) == ("onnxruntime-cpu-2t", 1)
    other = {"speedup": 1.5, "target": "onnxruntime-cpu-1t", "batch": 3}
    recipe = validate(recipe_of(vit_recipe, other, targets=targets), tmp_path)
    assert recipe.budget_target.threads == 1 and recipe.budget.batch == 3
    said = dict(planned_work(recipe, tmp_path))["search"]
    assert "latency table on onnxruntime-cpu-1t at batch 3" in said and "1.5x the speed" in said
