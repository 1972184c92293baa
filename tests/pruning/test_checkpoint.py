"""A pruned model on disk: readable, complete, and checked before it is believed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from optin_export.data import Sources, load_sources
from optin_export.errors import InputError
from optin_export.pruning import difference, load_model, save_model
from optin_export.pruning.rebuild import rebuild
from optin_export.recipe import validate
from optin_export.units import find_structure
from tests.conftest import Make
from tests.repair.plans import without


@pytest.fixture
def sources(vit_recipe: Make, tmp_path: Path) -> Sources:
    return load_sources(validate(vit_recipe(), tmp_path))


@pytest.fixture
def saved(sources: Sources, tmp_path: Path) -> Path:
    structure = find_structure(sources.model)
    plan, inputs = without(structure, {"block00.heads": [1, 2], "block01.neurons": [0]}), sources.fixed(2)
    dense, _ = rebuild(sources.model, structure, plan.groups, inputs)
    save_model(tmp_path / "model", dense, sources.loaded.architecture, structure, plan, inputs)
    return tmp_path / "model"


def test_a_loaded_model_is_compared_with_the_one_that_was_saved(saved: Path, sources: Sources) -> None:
    inputs = sources.fixed(2)
    model, again = load_model(saved), load_model(saved)
    assert difference(model, again, inputs) is None
    again.get_parameter("model.head.bias").data += 1e-2
    found = difference(model, again, inputs)
    assert found is not None and "outputs differ by" in found
    again.get_submodule("model.norm").forward = lambda x: x[:, :1].reshape(3, -1)  # type: ignore[method-assign]
    found = difference(model, again, inputs)
    assert found is not None and "does not run: RuntimeError" in found


def test_saved_files_are_readable_by_all(saved: Path) -> None:
    assert {path.name for path in saved.iterdir()} == {"architecture.json", "model.safetensors"}
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in saved.iterdir())
    assert load_model(saved)(torch.zeros(2, 1, 32, 32)).shape == (2, 5)


@pytest.mark.parametrize(
    "damage",
    [
        {"format": "something else"},
        {"version": 2},
        {"base": {"library": "timm", "name": "no_such_model", "args": {}}},
        {"base": {"library": "transformers", "class": "os", "config": {}}},
        {"base": {"library": "transformers", "class": "Trainer", "config": {}}},
        {"base": {}},
        {"groups": {"block00.heads": {"count": 4, "kept": 2}}},
        {"inputs": {"pixel_values": ["float32", [10**9, 10**9]]}},
        {"unknown": 1},
    ],
)
def test_a_damaged_architecture_is_refused(saved: Path, damage: dict) -> None:
    path = saved / "architecture.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **damage}))
    with pytest.raises(InputError):
        load_model(saved)


def test_truncated_weights_are_refused(saved: Path) -> None:
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(InputError):
        load_model(saved)


def test_a_python_source_is_not_run_unless_trusted(saved: Path, tmp_path: Path) -> None:
    code = tmp_path / "evil.py"
    code.write_text(f"open({str(tmp_path / 'marker')!r}, 'w').write('ran')\ndef make(): ...\n")
    path = saved / "architecture.json"
    base = {"library": "python", "source": f"py:{code}:make", "args": {}}
    path.write_text(json.dumps({**json.loads(path.read_text()), "base": base}))
    with pytest.raises(InputError, match="trust_python"):
        load_model(saved)
    assert not (tmp_path / "marker").exists()
