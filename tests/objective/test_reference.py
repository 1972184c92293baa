"""The unpruned model is run once per batch, whoever asks and in whichever order, and says the same from files."""

from __future__ import annotations

import gc
import tempfile
from pathlib import Path

import pytest
import torch

from optin_export.objective import Observation, Reference, derived, observe, samples_of
from optin_export.units import find_structure
from optin_export.workdir import disk_offload
from tests.units.models import batches_for, small_model

MODEL, _ = small_model("bert")
STRUCTURE, BATCHES = find_structure(MODEL), batches_for(MODEL, 3)


def expected() -> list[Observation]:
    """By a plain loop."""
    generator = torch.Generator().manual_seed(5)
    return [observe(MODEL, STRUCTURE, batch, 4, generator) for batch in BATCHES]


def reference(**options: object) -> Reference:
    return Reference(MODEL, STRUCTURE, BATCHES, 4, torch.Generator().manual_seed(5), **options)  # type: ignore[arg-type]


def assert_equal(found: Observation, wanted: Observation) -> None:
    assert torch.equal(found.output, wanted.output) and torch.equal(found.weights, wanted.weights)
    for name in ("rows", "chosen"):
        ours, theirs = getattr(found, name), getattr(wanted, name)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    counted: list[int] = []
    forward = MODEL.forward
    monkeypatch.setattr(MODEL, "forward", lambda **inputs: (counted.append(1), forward(**inputs))[1])
    return counted


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1, 2]])
def test_each_batch_is_run_once_with_the_numbers_of_its_turn(order: list[int], runs: list[int]) -> None:
    wanted, found = expected(), reference()
    runs.clear()
    found.observe(0)  # the structure is measured first
    before = len(runs)
    for number in order:
        assert_equal(found[number], wanted[number])
    assert len(runs) - before == 2 and len(found) == 3


def test_what_follows_draws_on_from_the_last_batch() -> None:
    generator = torch.Generator().manual_seed(5)
    for batch in BATCHES:
        observe(MODEL, STRUCTURE, batch, 4, generator)
    found = reference()
    found.observe()
    for _ in range(2):  # for every plan the same
        assert torch.equal(torch.rand(3, generator=found.generator()), torch.rand(3, generator=generator.clone_state()))


def test_a_worker_observes_only_its_own_batch(runs: list[int]) -> None:
    seed = torch.Generator().manual_seed(5)
    found = Reference(MODEL, STRUCTURE, BATCHES, 4, lambda number: derived(seed, 0, number))
    assert_equal(found[2], observe(MODEL, STRUCTURE, BATCHES[2], 4, derived(seed, 0, 2)))
    assert 2 in found.known and 0 not in found.known
    runs.clear()
    assert samples_of(found) == 18 and runs == []


def test_what_is_not_needed_is_not_kept() -> None:
    wanted = expected()[1]
    rows, output = reference(keep="rows")[1], reference(keep="output")[1]
    assert rows.hidden == output.hidden == {} and output.rows == {} and torch.equal(output.output, wanted.output)
    assert_equal(rows, wanted)


def test_passes_in_files_say_the_same_and_are_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(disk_offload, "IN_MEMORY", 0)
    found = reference()
    for number, wanted in enumerate(expected()):
        assert_equal(found[number], wanted)
        assert found[number].hidden.keys() == wanted.hidden.keys()
    assert list(tmp_path.rglob("*.pt"))
    found.close()
    del found
    gc.collect()
    assert not list(tmp_path.rglob("*.pt"))
