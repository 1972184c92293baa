"""When gradients are computed in bfloat16, and that the results are those of float32 to its rounding."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from optin_export import repair
from optin_export.models import Placement, reduced_precision
from optin_export.recipe import Budget, PruneSection
from optin_export.repair import RepairSettings
from optin_export.scoring import precision, precision_of, score
from optin_export.units import find_structure
from tests.units.models import batches_for, small_model


def section(**fields: Any) -> PruneSection:
    return PruneSection(budget=Budget(macs=0.5), probes=8, **fields)


def chosen(name: str = "bert", **fields: Any) -> tuple[str | None, float | None]:
    model, _ = small_model(name)
    given = (model, find_structure(model), batches_for(model, 2, size=8), section(**fields), 0, Placement())
    return precision_of(*given)


@pytest.fixture
def gains(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a machine with instructions for bfloat16 decides on a large model."""
    monkeypatch.setattr(reduced_precision, "SMALLEST", 0)
    monkeypatch.setattr(reduced_precision, "multiplies_bfloat16", lambda: True)


@pytest.mark.usefixtures("gains")
@pytest.mark.parametrize("name", ["bert", "vit", "bert-embedding"])
def test_a_model_that_ranks_alike_is_scored_in_bfloat16(name: str) -> None:
    dtype, agreement = chosen(name)
    assert dtype == "bfloat16"
    assert agreement is not None and 0.99 <= agreement < 1.0  # 1 would be the same precision twice


@pytest.mark.usefixtures("gains")
def test_a_model_that_ranks_otherwise_is_scored_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    work, model = precision.Sketch.work, small_model("bert")[0]

    def scrambled(sketch: Any, shard: Any) -> Any:
        found = work(sketch, shard)
        return {key: value[::-1] for key, value in found.items()} if sketch.autocast else found

    monkeypatch.setattr(precision.Sketch, "work", scrambled)
    dtype, agreement = chosen()
    assert dtype is None and agreement is not None and agreement < 0.99
    structure, batches = find_structure(model), batches_for(model, 1, size=8)
    found, plain = (score(model, structure, batches, section(autocast=one), 0) for one in ("auto", None))
    assert found.info["bfloat16_agreement"] < 0.99 and "bfloat16_agreement" not in plain.info
    assert all(np.array_equal(found.values[key], plain.values[key]) for key in plain.values)


@pytest.mark.usefixtures("gains")
@pytest.mark.parametrize("value", [1.0, float("nan")])
def test_gradients_without_an_order_are_not_taken(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """All alike in one of the losses: a correlation with them is NaN, which is smaller than nothing."""
    work = precision.Sketch.work

    def flat(sketch: Any, shard: Any) -> Any:
        found = work(sketch, shard)
        spoilt = {key: np.full_like(one, value) for key, one in found.items() if key.startswith("output")}
        return found | spoilt if sketch.autocast else found

    monkeypatch.setattr(precision.Sketch, "work", flat)
    assert chosen() == (None, 0.0)


def test_neither_small_models_nor_other_processors_change(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reduced_precision, "multiplies_bfloat16", lambda: True)
    assert chosen() == (None, None)
    monkeypatch.setattr(reduced_precision, "SMALLEST", 0)
    monkeypatch.setattr(reduced_precision, "multiplies_bfloat16", lambda: False)
    assert chosen() == (None, None)


@pytest.mark.usefixtures("gains")
def test_the_recipe_decides_otherwise() -> None:
    assert chosen(autocast=None) == (None, None)
    assert chosen(autocast="float16") == ("float16", None)
    assert not reduced_precision.gains_by_bfloat16(small_model("bert")[0].to(torch.bfloat16))


@pytest.mark.parametrize("name", ["bert", "vit"])
def test_row_weights_and_loss_curves_in_bfloat16(name: str) -> None:
    """Both within the rounding of 8 bits, and not the same bits: the passes do run in bfloat16."""
    model, _ = small_model(name)
    structure, batches = find_structure(model), batches_for(model, 4, size=8)
    dtypes = (None, "bfloat16")
    exact, fast = (repair.sensitivities(model, structure, batches, 0, one) for one in dtypes)
    for path, rows in exact.values[0].items():
        assert fast.values[0][path].dtype == torch.float32 and not torch.equal(fast.values[0][path], rows)
        assert float((fast.values[0][path] - rows).abs().mean()) < 0.1
    scores = {group.key: np.arange(group.count, dtype=float) for group in structure.groups}
    least = {group.key: 1 for group in structure.groups}
    curves = [
        repair.loss_curves(
            model, structure, scores, batches[:2], batches[2:], RepairSettings(autocast=one), least=least, weights=exact
        )
        for one in dtypes
    ]
    for column in (1, 2):
        first, second = (np.concatenate([found[key][:-1, column] for key in sorted(found)]) for found in curves)
        assert not np.array_equal(first, second)
        assert spearmanr(first, second).statistic > 0.98
        np.testing.assert_allclose(second, first, rtol=0.2, atol=1e-3 * first.max())
