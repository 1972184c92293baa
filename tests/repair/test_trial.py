"""A plan that is tried: judged as a plain loop does, on rows that its repair has not seen."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from optin_export.models import TaskModel
from optin_export.pruning.rebuild import rebuild
from optin_export.repair import judge, outputs_of, trial_batches
from optin_export.units import Structure, find_structure
from tests.repair.plans import halved
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


def test_trial_rows_are_spread_and_are_not_those_that_judge(vit: tuple[TaskModel, Structure]) -> None:
    batches = batches_for(vit[0], 20, size=8)
    judged = [batches[index] for index in (1, 5, 9)]
    chosen = trial_batches(batches, judged)
    assert chosen == [index for index in range(20) if index not in (1, 5, 9)]  # fewer than TRIAL_ROWS rows: all
    assert trial_batches(batches[:1], batches[:1]) == [0]
