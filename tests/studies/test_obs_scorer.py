"""The scorer `obs` against the least-squares problems it stands for, solved one by one."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from optin_export.errors import InputError
from optin_export.recipe import Budget, PruneSection
from optin_export.scoring import score
from optin_export.scoring.activation import inputs_of
from optin_export.units import as_matrix, columns_per_unit, find_structure, get_layer, input_rows
from tests.test_docs import load_tool
from tests.units.models import batches_for, small_model

load_tool("comparison_scorers")
elimination = sys.modules["obs_scorer"]
elimination_scores = elimination.elimination_scores


@pytest.mark.parametrize("name", ["bert", "resnet-cifar"])
def test_each_unit_is_the_one_that_the_others_replace_best(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first removals, found again by refitting the reader without each unit that is still there."""
    monkeypatch.setattr(elimination, "DAMPING", 1e-9)
    model, _ = small_model(name)
    structure, batches = find_structure(model), batches_for(model, 4, size=4)
    group = structure.groups[-1]
    found = elimination_scores(model, [group], batches)[group.key]
    with torch.no_grad(), inputs_of(model, [group.consumer]) as seen:
        rows = []
        for index, batch in enumerate(batches):
            model(**batch.inputs)
            rows.append(input_rows(seen[group.consumer], get_layer(model, group.consumer), batch.inputs, index))
    design = torch.cat(rows).double()
    design = design - design.mean(0)
    wanted = design @ as_matrix(model, group.consumer).double().T
    power = float(wanted.square().sum(1).mean())
    width = columns_per_unit(get_layer(model, group.consumer), group)

    def error(left: list[int]) -> float:
        columns = [unit * width + column for unit in left for column in range(width)]
        part = design[:, columns]
        gram = part.T @ part
        gram.diagonal().add_(1e-9 * float(gram.diagonal().mean()))
        fitted = part @ torch.linalg.solve(gram, part.T @ wanted)
        return float((wanted - fitted).square().sum()) / len(design)

    left, before = list(range(group.count)), 0.0
    for _ in range(3):
        errors = {unit: error([other for other in left if other != unit]) for unit in left}
        best = min(left, key=lambda unit: errors[unit])
        gone = min(left, key=lambda unit: found[unit])
        assert errors[gone] == pytest.approx(errors[best], rel=1e-2, abs=1e-6 * power)
        assert found[gone] == pytest.approx(errors[gone] - before, rel=0.05, abs=1e-5 * power)
        before = errors[gone]
        left.remove(gone)


def test_a_copy_costs_nothing_to_remove() -> None:
    """Magnitude would keep both of two equal units; the refit needs one."""
    model, _ = small_model("vit")
    structure, batches = find_structure(model), batches_for(model, 4, size=4)
    group = next(one for one in structure.groups if one.kind == "neurons")
    producer = get_layer(model, group.producers[0].path)
    with torch.no_grad():
        producer.weight[3] = producer.weight[5]
        if producer.bias is not None:
            producer.bias[3] = producer.bias[5]
        get_layer(model, group.consumer).weight[:, [3, 5]] *= 3
    found = elimination_scores(model, [group], batches)[group.key]
    order = np.argsort(found)
    assert set(order[:8]) & {3, 5} and set(order[-8:]) & {3, 5}


def test_groups_that_do_not_fit_together_take_several_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = small_model("bert")
    structure, batches = find_structure(model), batches_for(model, 2, size=2)
    together = elimination_scores(model, structure.groups, batches)
    monkeypatch.setattr(elimination, "ROOM", 1)
    apart = elimination_scores(model, structure.groups, batches)
    assert all(np.array_equal(together[key], apart[key]) for key in together)


def test_activations_that_are_not_finite_are_refused() -> None:
    model, _ = small_model("vit")
    structure, batches = find_structure(model), batches_for(model, 2, size=2)
    with torch.no_grad():
        get_layer(model, structure.groups[0].producers[0].path).weight[0] = float("nan")
    with pytest.raises(InputError, match="not finite"):
        score(
            model, structure, batches, PruneSection(budget=Budget(macs=0.5)).model_copy(update={"score": "obs"}), seed=0
        )
