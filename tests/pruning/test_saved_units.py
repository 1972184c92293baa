"""Units in architecture.json: what is loaded is what was saved, and nothing forged changes anything else."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from optin_export.errors import InputError
from optin_export.pruning import rebuild, verified
from optin_export.pruning.saved_units import SavedUnits, saved_units
from optin_export.search import GroupPlan
from optin_export.units import Structure, find_structure
from optin_export.units.discovery import found_structure
from optin_export.units.trace import observe_pass
from tests.repair.plans import halved
from tests.units.discover import branches, nets
from tests.units.models import small_model

NETS: dict[str, Callable[[], nets.Net]] = {
    "sizes": nets.attention,
    "tables": nets.with_tables,
    "slabs": lambda: nets.fused_attention(False),
    "gated": lambda: nets.gated(True),
}


def structure_of(model: Any, inputs: nets.Inputs) -> Structure:
    return verified(model, found_structure(model, inputs, observe_pass(model, inputs), None), inputs)


def saved(model: Any) -> dict[str, Any]:
    """As it is in the file."""
    units = saved_units(structure_of(model, nets.tokens()))
    assert units is not None
    return json.loads(units.model_dump_json())


@pytest.mark.parametrize("name", NETS)
def test_a_model_is_rebuilt_from_them_without_measurement(name: str) -> None:
    model, inputs = NETS[name](), nets.tokens()
    structure = structure_of(model, inputs)
    loaded = SavedUnits.model_validate(saved(model)).structure(model, structure.family)
    plan = halved(structure)
    dense, _ = rebuild(model, structure, plan.groups, inputs)
    again, _ = rebuild(model, loaded, plan.groups, inputs)
    assert {name: tensor.shape for name, tensor in again.state_dict().items()} == {
        name: tensor.shape for name, tensor in dense.state_dict().items()
    }
    assert torch.equal(again(**inputs), dense(**inputs))


@pytest.mark.parametrize("make", [branches.dense, branches.parts, branches.listed_parts, branches.upsampled])
def test_columns_are_saved_with_the_rows(make: Callable[[], nets.Net]) -> None:
    model, inputs = make(), nets.images()
    structure = structure_of(model, inputs)
    units = saved_units(structure)
    assert units is not None
    loaded = SavedUnits.model_validate(json.loads(units.model_dump_json())).structure(model, structure.family)
    assert [one.columns for one in loaded.groups] == [one.columns for one in structure.groups]
    assert any(one.columns for one in loaded.groups)
    plan = halved(structure)
    dense, smaller = rebuild(model, structure, plan.groups, inputs)
    again, _ = rebuild(model, loaded, plan.groups, inputs)
    assert torch.equal(again(**inputs), dense(**inputs))
    # The smaller structure names the features that they have now: the smaller model can be cut again.
    check_again = halved(smaller, 0.5, 1)
    rebuild(dense, smaller, check_again.groups, inputs)[0](**inputs)


def test_rows_one_by_one_are_kept_as_runs() -> None:
    model, inputs = nets.permuted(), nets.tokens()
    structure = found_structure(model, inputs, observe_pass(model, inputs), None)
    units = saved_units(structure)
    assert units is not None
    assert units.groups[0].producers[0].index == (((3, 1),), ((0, 1),), ((5, 1),), ((1, 1),), ((4, 1),), ((2, 1),))
    loaded = units.structure(model, structure.family)
    assert loaded.groups[0].producers == structure.groups[0].producers


def dense_net(growth: int, layers: int = 5) -> nets.Net:
    """A block of DenseNet: every layer reads, after a norm of its own, the channels of all layers before it."""

    def run(parts: Any, x: torch.Tensor) -> torch.Tensor:
        made = [parts.stem(x)]
        for number in range(layers):
            norm, layer = getattr(parts, f"norm{number}"), getattr(parts, f"conv{number}")
            made.append(layer(norm(torch.cat(made, 1)).relu()))
        return parts.head(torch.cat(made, 1).mean((2, 3)).relu())

    parts: dict[str, nn.Module] = {"stem": nn.Conv2d(3, growth, 3)}
    for number in range(layers):
        parts[f"norm{number}"] = nn.BatchNorm2d(growth * (number + 1))
        parts[f"conv{number}"] = nn.Conv2d(growth * (number + 1), growth, 3, padding=1)
    return nets.net(run, **parts, head=nn.Linear(growth * (layers + 1), 3))


def test_the_file_grows_with_the_layers_that_are_named_and_not_with_their_channels() -> None:
    sizes = []
    for growth in (8, 32):
        model, inputs = dense_net(growth), nets.images()
        units = saved_units(found_structure(model, inputs, observe_pass(model, inputs), None))
        assert units is not None
        text = units.model_dump_json(indent=2)
        named = text.count('"path"') + text.count('"consumer"')
        assert len(text) < 450 * named
        sizes.append(len(text))
    assert sizes[1] < 1.02 * sizes[0]


def test_declared_units_are_not_saved() -> None:
    model, _ = small_model("vit")
    assert saved_units(find_structure(model)) is None


def _heads(units: dict[str, Any]) -> dict[str, Any]:
    return next(group for group in units["groups"] if group["kind"] == "heads")


def _set(**fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda units: _heads(units).update(fields)


def _producer(**fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda units: _heads(units)["producers"][0].update(fields)


FORGED: dict[str, Callable[[dict[str, Any]], None]] = {
    "rows out of range": _producer(rows=None, index=[[[unit, 1]] for unit in (0, 1, 2, 900)]),
    "billions of rows": _producer(rows=None, index=[[[0, 1 << 31]]] * 4),
    "billions of rows in a slab": _producer(rows=1 << 31),
    "too many slabs": _producer(fused=64),
    "billions of units": _producer(rows=None, index=[{"units": 1 << 31, "step": 0, "runs": [[0, 1]]}]),
    "units far away": _producer(rows=None, index=[{"units": 4, "step": 1 << 31, "runs": [[0, 1]]}]),
    "columns of another layer": _set(columns=[{"path": "q", "index": [[[0, 1 << 31]]] * 4}]),
    "rows of too few units": _producer(rows=None, index=[[[0, 1]]] * 2),
    "rows of different sizes": _producer(rows=None, index=[[[0, 1]], [[1, 1]], [[2, 1]], [[3, 2]]]),
    "an unknown layer": _producer(path="no.such.layer"),
    "a method as a layer": _producer(path="forward"),
    "an unknown consumer": _set(consumer="nothing"),
    "the model as a consumer": _set(consumer=""),
    "a size of another layer": _set(sizes=[["head.in_features", 2]]),
    "a size that is a flag": _set(sizes=[["training", 0]]),
    "a size of another value": _set(sizes=[["heads", 2]]),
    "an unknown size": _set(sizes=[["beds", 1]]),
    "a hidden attribute": _set(sizes=[["__class__.__name__", 1]]),
    "another count": _set(count=8),
    "another width": _set(width=16),
    "an unknown table": _set(tables=[{"path": "no.table", "dim": 0, "entries": 1, "index": None}]),
    "a table that is a module": _set(tables=[{"path": "q", "dim": 0, "entries": 1, "index": None}]),
    "a table of fewer dimensions": _set(tables=[{"path": "q.bias", "dim": 3, "entries": 1, "index": None}]),
}


@pytest.mark.parametrize("name", FORGED)
def test_forged_units_are_refused_and_change_nothing(name: str) -> None:
    model = nets.attention()
    units = saved(model)
    FORGED[name](units)
    before = {key: value for key, value in vars(model).items() if isinstance(value, int)}
    with pytest.raises(InputError):
        SavedUnits.model_validate(units).structure(model, "discovered")
    assert {key: value for key, value in vars(model).items() if isinstance(value, int)} == before
    assert model.head.in_features == 8


@pytest.mark.parametrize("change", [{"format": "other"}, {"more": 1}, {"groups": [{}]}, {"blocks": [1]}])
def test_another_layout_is_no_saved_units(change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        SavedUnits.model_validate({**saved(nets.attention()), **change})


def test_a_plan_for_another_number_of_units_is_refused() -> None:
    model = nets.attention()
    structure = SavedUnits.model_validate(saved(model)).structure(model, "discovered")
    plans = {group.key: GroupPlan(count=group.count + 1, kept=(0,)) for group in structure.groups}
    with pytest.raises(InputError, match="not for this model"):
        rebuild(model, structure, plans, nets.tokens())
