"""Reference passes in files say what they say in memory, and leave nothing behind."""

from __future__ import annotations

import gc
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

from optin_export import scoring
from optin_export.data import load_sources
from optin_export.errors import EnvironmentLacks
from optin_export.recipe import validate
from optin_export.units import find_structure
from optin_export.workdir import disk_offload
from tests.conftest import Make


def test_scores_are_the_same_from_files(vit_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "temporary"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    sources = load_sources(validate(vit_recipe(), tmp_path))
    structure = find_structure(sources.model)

    def scores() -> dict[str, np.ndarray]:
        prune = sources.recipe.prune
        return scoring.score(sources.model, structure, sources.scoring, prune, 0).values

    saved, sink = [], disk_offload.sink
    expected = scores()
    monkeypatch.setattr(disk_offload, "IN_MEMORY", 0)
    monkeypatch.setattr(disk_offload, "sink", lambda path: saved.append(path) or sink(path))
    found = scores()
    # All rows, and those on which single units are masked.
    assert len(saved) == 2 * len(sources.scoring) and all(place in path.parents for path in saved)
    assert all(np.array_equal(found[key], expected[key]) for key in expected)
    gc.collect()
    assert list(place.iterdir()) == []


def test_a_full_disk(vit_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = load_sources(validate(vit_recipe(), tmp_path))

    def full(*args: object) -> None:
        raise RuntimeError("unexpected pos: No space left")

    monkeypatch.setattr(disk_offload, "IN_MEMORY", 0)
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(EnvironmentLacks, match="cannot keep activations"):
        prune = sources.recipe.prune
        scoring.score(sources.model, find_structure(sources.model), sources.scoring, prune, 0)
