"""Loss curves: what keeping k units costs, measured on the model itself, which is then as it was."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from optin_export.models import TaskModel
from optin_export.progress import reporting
from optin_export.recipe import Budget, PruneSection
from optin_export.repair import RepairSettings, curves, loss_curves
from optin_export.repair.least_squares import Moments
from optin_export.scoring import score
from optin_export.units import Structure, find_structure, get_layer, masked, refitted
from tests.units.models import batches_for, small_model


def magnitude(model: TaskModel, structure: Structure) -> dict[str, np.ndarray]:
    return score(model, structure, (), PruneSection(budget=Budget(macs=0.5), score="magnitude"), seed=0).values


def curves_of(model: TaskModel, structure: Structure, **changes: Any) -> dict[str, np.ndarray]:
    settings: dict[str, Any] = {
        "scores": magnitude(model, structure),
        "calibration": batches_for(model, 4, size=8),
        "scoring": batches_for(model, 1, size=8, first_seed=50),
        "least": {group.key: 0 if group.sublayer else 1 for group in structure.groups},
        "repair": True,
        **changes,
    }
    rows = (settings[name] for name in ("scores", "calibration", "scoring"))
    return loss_curves(model, structure, *rows, RepairSettings(settings["repair"]), least=settings["least"])


@pytest.mark.parametrize("name", ["bert", "vit", "resnet-timm", "vgg-bn"])
def test_curves_end_at_nothing_lost_and_mostly_fall(name: str) -> None:
    model, _ = small_model(name)
    structure = find_structure(model)
    ticks: list[tuple[int, int]] = []
    with reporting(lambda *step: ticks.append(step)):
        found = curves_of(model, structure)
    assert list(found) == [group.key for group in structure.groups]
    assert ticks == [(number, 2 * len(found) + 1) for number in range(1, 2 * len(found) + 2)]
    falling = []
    for group in structure.groups:
        curve = found[group.key]
        assert curve.dtype == np.float64 and curve.shape[1] == 3
        assert np.isfinite(curve).all() and (curve >= -1e-9).all()
        assert curve[0, 0] == (0 if group.sublayer else 1)
        assert (np.diff(curve[:, 0]) > 0).all() and len(curve) <= 24
        assert curve[-1].tolist() == [group.count, 0.0, 0.0]
        assert curve[0, 1] > 0 and curve[0, 2] > 0
        falling.append((np.diff(curve[:, 1]) <= 0).mean())
    assert np.mean(falling) > 0.6


@pytest.mark.parametrize("name", ["vit-no-qkv-bias", "resnet-cifar", "vgg"])
def test_the_model_is_as_it_was(name: str) -> None:
    """Bit for bit, and a layer without bias has none again."""
    model, _ = small_model(name)
    structure = find_structure(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    first = curves_of(model, structure)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not any("forward" in vars(module) for module in model.modules())
    second = curves_of(model, structure)
    assert all(np.array_equal(first[key], second[key]) for key in first)


def test_the_model_is_as_it_was_when_something_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = small_model("resnet-cifar")
    structure = find_structure(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}

    def fail(*args: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(curves, "losses_of", fail)
    with pytest.raises(MemoryError):
        curves_of(model, structure)
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_no_point_lies_below_the_smallest_count() -> None:
    model, _ = small_model("vit")
    structure = find_structure(model)
    least = {group.key: 3 if group.kind == "heads" else 40 for group in structure.groups}
    found = curves_of(model, structure, least=least)
    assert {key: curve[0, 0] for key, curve in found.items()} == least
    assert all((np.diff(curve[:, 0]) > 0).all() for curve in found.values())


@pytest.mark.parametrize(("units", "least"), [(4, 0), (20, 1), (64, 0), (64, 8), (1000, 0), (1, 1)])
def test_counts_of_a_curve(units: int, least: int) -> None:
    """Every count of a small group; else steps, finer at the beginning, where the curve is steep."""
    counts = curves.counts_of(units, least)
    assert counts[0] == least and counts[-1] == units and counts == sorted(set(counts))
    assert len(counts) <= curves.POINTS + 3
    if units <= curves.POINTS:
        assert counts == list(range(least, units + 1))
    elif least == 0:
        assert counts[1] == round(0.02 * units)


@pytest.mark.parametrize("name", ["bert", "resnet-timm-bottleneck", "vgg", "gpt2"])
@pytest.mark.parametrize("damping", [None, 1e12])
def test_without_a_refit_the_layers_do_not_read_the_units(
    name: str, damping: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a repair, or with endless damping, a pass is that of the masked units."""
    model, _ = small_model(name)
    inputs = batches_for(model, 1)[0].inputs
    structure = find_structure(model)
    for group in structure.groups[:2]:
        order, half = list(range(group.count))[::-1], group.count // 2
        layers, mask = {}, torch.zeros(group.count)
        mask[order[:half]] = 1.0
        for path in group.reads:
            layer, start = get_layer(model, path), curves._start(get_layer(model, path))
            gram = None if damping is None else _moments(torch.eye(len(start) - 1))
            monkeypatch.setattr(curves, "DAMPING", damping)
            weights, biases = curves._changes(model, group, path, order, [1, half], gram, False)
            bias = torch.zeros_like(biases[1]) if layer.bias is None else layer.bias
            layers[path] = layer.weight + weights[1], bias + biases[1]
        with torch.no_grad():
            with refitted(model, layers):
                changed = model(**inputs)
            with masked(model, [group], {group.key: mask}):
                torch.testing.assert_close(changed, model(**inputs), rtol=1e-4, atol=1e-5)


def _moments(rows: torch.Tensor) -> Moments:
    found = Moments(rows.shape[1], 0)
    found.add(rows, rows.new_zeros(len(rows), 0))
    return found


def test_refits_are_those_of_each_count_alone() -> None:
    """By a solver of its own for every count: min over X of the squared error plus rho |X - X0|^2."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(40, 6, generator=generator, dtype=torch.float64) + 0.3
    design, start = torch.cat([rows, torch.ones(40, 1)], 1), torch.randn(7, 3, generator=generator).double()
    moments = _moments(rows)
    rho = curves.DAMPING * float((design.T @ design).diagonal().mean())
    sets = [torch.tensor([], dtype=torch.int64), torch.tensor([4]), torch.tensor([1, 2, 4]), torch.arange(6)]
    for columns, found in zip(sets, curves._refitted(start, moments, sets), strict=True):
        kept = [*columns.tolist(), 6]
        left = torch.cat([design[:, kept], rho**0.5 * torch.eye(len(kept))])
        right = torch.cat([design @ start, rho**0.5 * start[kept]])
        wanted = torch.zeros_like(start)
        wanted[kept] = torch.linalg.lstsq(left, right).solution
        torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-8)


def test_refits_by_what_leaves_are_those_by_what_stays() -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(31, 4, generator=generator, dtype=torch.float64)
    some = [one for one in range(30) if one not in (3, 4, 5, 6, 20, 21)]
    sets = [torch.tensor(sorted([*some, *more])) for more in ([], [3, 4], [3, 4, 20, 21], [3, 4, 5, 6, 20, 21])]
    for rows in (torch.randn(90, 30, generator=generator, dtype=torch.float64) + 0.3, torch.zeros(9, 30)):
        moments = _moments(rows.double())
        every = zip(
            sets, curves._refitted_without(start, moments, sets), curves._refitted(start, moments, sets), strict=True
        )
        for columns, change, solution in every:
            torch.testing.assert_close(start + change, solution, rtol=1e-9, atol=1e-9)
            gone = sorted({*range(30)} - {*columns.tolist()})
            assert (start + change)[gone].abs().sum() == 0


def test_rescaled_curves_are_those_of_the_best_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    """One factor per kept head: plain least squares on what the layer reads gives the same weights."""
    monkeypatch.setattr(curves, "DAMPING", 1e-9)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(50, 12, generator=generator, dtype=torch.float64) + 0.5
    start = torch.randn(13, 5, generator=generator, dtype=torch.float64)
    columns = torch.tensor([*range(3), *range(6, 12)])  # units 0, 2, 3
    found = curves._rescaled(start, _moments(rows), columns, 3)
    parts = torch.stack(
        [(rows[:, 3 * unit : 3 * unit + 3] @ start[3 * unit : 3 * unit + 3]).flatten() for unit in (0, 2, 3)]
    )
    factors = torch.linalg.lstsq(parts.T, (rows @ start[:-1]).flatten()[:, None]).solution[:, 0]
    wanted = start.clone()
    wanted[3:6] = 0
    for unit, factor in zip((0, 2, 3), factors, strict=True):
        wanted[3 * unit : 3 * unit + 3] *= factor
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-6)


def test_each_repair_has_its_own_curves() -> None:
    """Refitted they lie lowest, masked highest; the search would allocate by the wrong ones otherwise."""
    model, _ = small_model("vit")
    structure = find_structure(model)
    refitted, rescaled, plain = (curves_of(model, structure, repair=repair) for repair in (True, "rescale", False))
    middles = [[curve[len(curve) // 2, 1] for curve in one.values()] for one in (refitted, rescaled, plain)]
    assert np.mean(middles[0]) < np.mean(middles[1]) < np.mean(middles[2])


def test_a_layer_that_the_repair_cannot_refit_is_masked_in_the_curves() -> None:
    """timm's "same" padding: its patches are not what `input_rows` takes out, so the repair leaves it as it is."""
    model, _ = small_model("vit")
    structure = find_structure(model)
    group = structure.groups[0]
    assert curves._repaired(model, group, True) == group.reads
    assert curves._repaired(model, group, "rescale") == (group.consumer,)
    assert curves._repaired(model, group, False) == ()


def test_a_refit_lowers_the_curve(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = small_model("vit")
    structure = find_structure(model)
    refits = curves_of(model, structure)
    monkeypatch.setattr(curves, "DAMPING", 1e12)
    masked_only = curves_of(model, structure)
    middles = [[curve[len(curve) // 2, 1] for curve in one.values()] for one in (refits, masked_only)]
    assert np.mean(middles[0]) < np.mean(middles[1])


def test_units_that_stand_in_for_each_other_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every second neuron computes what the one before it does: half of them are enough, no score needs to say so."""
    monkeypatch.setattr(curves, "DAMPING", 1e-9)
    model, _ = small_model("vit")
    structure = find_structure(model)
    group = structure.groups[1]
    up = get_layer(model, group.producers[0].path)
    assert up.bias is not None
    up.weight.data[1::2], up.bias.data[1::2] = up.weight.data[::2].clone(), up.bias.data[::2].clone()
    scores = magnitude(model, structure) | {group.key: np.tile([2.0, 1.0], group.count // 2)}
    curve = curves_of(model, structure, scores=scores)[group.key]
    half, quarter = (int(np.searchsorted(curve[:, 0], group.count * share)) for share in (0.5, 0.25))
    assert curve[half, 0] == group.count // 2
    assert curve[half, 1] < 1e-4 * curve[quarter, 1]


def test_batches_are_thinned_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = small_model("vit")
    batches = batches_for(model, 12, size=2)
    monkeypatch.setattr(curves, "CALIBRATION_ROWS", 8)
    assert curves.not_judged(batches, (), curves.CALIBRATION_ROWS) == [0, 3, 6, 9]
    monkeypatch.setattr(curves, "CALIBRATION_ROWS", 1000)
    assert curves.not_judged(batches, (), curves.CALIBRATION_ROWS) == list(range(12))
    assert curves.not_judged(batches, batches[1:11:3], curves.CALIBRATION_ROWS) == [0, 2, 3, 5, 6, 8, 9, 11]
    assert curves.not_judged(batches[:1], batches[:1], curves.CALIBRATION_ROWS) == [0]


def test_a_refit_is_judged_on_other_rows_than_it_was_fitted_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """With fewer rows that a classifier reads than inputs, a refit seems to replace any unit on the rows it knows."""
    monkeypatch.setattr(curves, "DAMPING", 1e-6)
    model, _ = small_model("vit")
    structure = find_structure(model)
    batches = batches_for(model, 6, size=2)
    own = curves_of(model, structure, calibration=batches, scoring=batches)
    apart = curves_of(model, structure, calibration=batches, scoring=batches[1::3])
    last = [key for key in own if key.startswith(structure.groups[-1].key.split(".")[0])]
    assert np.mean([apart[key][1:-1, 2].mean() / own[key][1:-1, 2].mean() for key in last]) > 2


def test_constant_activations_leave_the_layer_alone() -> None:
    """A Gram matrix without anything to invert: the loss is that of cutting, and finite."""
    model, _ = small_model("vit")
    structure = find_structure(model)
    group = structure.groups[1]
    up = get_layer(model, group.producers[0].path)
    assert up.bias is not None
    up.weight.data.zero_(), up.bias.data.zero_()
    curve = curves_of(model, structure)[group.key]
    assert np.isfinite(curve).all() and curve[:, 1:].max() < 1e-6  # they all say nothing
