"""Plans that are tried: judged as a plain loop does, on rows that their repair has not seen, the best one chosen."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from optin_export.models import TaskModel
from optin_export.pruning.rebuild import rebuild
from optin_export.repair import judge, outputs_of, trial_batches, trials, try_plans
from optin_export.search import Plan
from optin_export.units import Structure, find_structure
from tests.repair.plans import halved, plan_of
from tests.units.models import batches_for, inputs_for, small_model


@pytest.fixture(scope="module")
def vit() -> tuple[TaskModel, Structure]:
    model, _ = small_model("vit")
    return model, find_structure(model)


def test_a_model_is_judged_as_a_plain_loop_does(vit: tuple[TaskModel, Structure]) -> None:
    model, structure = vit
    batches = batches_for(model, 3, size=8)
    dense, _ = rebuild(model, structure, halved(structure).groups, inputs_for(model, 2, 0))
    divergence, changed = judge(dense, outputs_of(model, structure, batches, seed=0), 1.0)
    losses, others = [], []
    with torch.no_grad():
        for batch in batches:
            wanted, given = model(**batch.inputs), dense(**batch.inputs)
            p, q = F.softmax(wanted, -1), F.softmax(given, -1)
            losses.append((p * (p.log() - q.log())).sum(-1))
            others.append(wanted.argmax(-1) != given.argmax(-1))
    assert divergence == pytest.approx(float(torch.cat(losses).mean()), rel=1e-4)
    assert changed == pytest.approx(float(torch.cat(others).float().mean())) and changed > 0


def test_outputs_that_are_no_classes_do_not_change_class() -> None:
    model, _ = small_model("bert-embedding")
    structure = find_structure(model)
    divergence, changed = judge(model, outputs_of(model, structure, batches_for(model, 1, size=4), seed=0), 1.0)
    assert divergence == pytest.approx(0.0, abs=1e-9) and changed is None


def tried(vit: tuple[TaskModel, Structure], plans: dict[str, Plan]) -> tuple[Plan, list[Plan]]:
    model, structure = vit
    built: list[Plan] = []

    def build(plan: Plan) -> TaskModel:
        built.append(plan)
        return rebuild(model, structure, plan.groups, inputs_for(model, 2, 0))[0]

    references = outputs_of(model, structure, batches_for(model, 2, size=8), seed=0)
    return try_plans(plans, build, references, fitted=5, temperature=1.0), built


def test_the_best_plan_is_chosen_and_equal_ones_are_built_once(vit: tuple[TaskModel, Structure]) -> None:
    _, structure = vit
    few, many = halved(structure, 0.25), halved(structure, 0.75)
    plan, built = tried(vit, {"first": few, "equal": halved(structure, 0.25), "second": many})
    assert built == [few, many] and plan.groups == many.groups
    assert plan.trials is not None and [one.rule for one in plan.trials.tried] == ["first", "second"]
    assert (plan.trials.chosen, plan.trials.fitted, plan.trials.judged) == (1, 5, 16)
    assert plan.trials.expected.divergence < plan.trials.tried[0].divergence


def test_a_gain_within_the_margin_is_chance(vit: tuple[TaskModel, Structure], monkeypatch: pytest.MonkeyPatch) -> None:
    found = iter([(1.0, 0.5), (1.0 - trials.MARGIN / 2, 0.1)] * 2)
    monkeypatch.setattr(trials, "judge", lambda *_: next(found))
    _, structure = vit
    plans = {"first": halved(structure, 0.25), "second": plan_of(structure, {})}
    plan, _ = tried(vit, plans)
    assert plan.trials is not None and plan.trials.chosen == 0 and plan.groups == plans["first"].groups
    monkeypatch.setattr(trials, "MARGIN", 0.0)
    assert tried(vit, plans)[0].groups == plans["second"].groups


def test_trial_rows_are_spread_and_are_not_those_that_judge(vit: tuple[TaskModel, Structure]) -> None:
    batches = batches_for(vit[0], 20, size=8)
    judged = [batches[index] for index in (1, 5, 9)]
    chosen = trial_batches(batches, judged)
    assert chosen == [index for index in range(20) if index not in (1, 5, 9)]  # fewer than TRIAL_ROWS rows: all
    assert trial_batches(batches[:1], batches[:1]) == [0]
