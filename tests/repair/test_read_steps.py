"""Passes in which layers are observed: one per block, or one for all blocks of a model that runs whole each time."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from optin_export.recipe import Budget, PruneSection
from optin_export.repair import RepairSettings, loss_curves, read_steps
from optin_export.repair.paired_forward import Stream
from optin_export.scoring import score
from optin_export.units import Structure, find_structure, measured
from tests.units.models import batches_for, small_model


def _whole(structure: Structure) -> Structure:
    assert structure.walk is not None
    return replace(structure, walk=replace(structure.walk, whole="for this test"))


@pytest.mark.parametrize("coupled", [False, True])
def test_blocks_share_a_pass_where_every_pass_runs_the_whole_model(coupled: bool) -> None:
    model, _ = small_model("resnet-torchvision")
    batch = batches_for(model, 1)[0]
    structure = measured(model, find_structure(model, coupled), batch.inputs)
    readers = {group.key: group.reads for group in structure.groups}
    each = read_steps.steps_of(Stream(model, structure, [batch]), readers)
    together = read_steps.steps_of(Stream(model, _whole(structure), [batch]), readers)
    assert len(each) == len(structure.order) > 1 and len(together) == 1
    for steps in (each, together):
        # Every layer is observed, and once.
        found = [path for step in steps for path in step.readers]
        assert sorted(found) == sorted({path for paths in readers.values() for path in paths})
        assert [group for step in steps for group in step.groups] == [g for g in structure.groups if not g.coupled]
    assert together[0].block == structure.order[-1] and together[0].until == each[-1].until


def test_gram_matrices_that_do_not_fit_together_take_more_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = small_model("resnet-torchvision")
    batch = batches_for(model, 1)[0]
    structure = _whole(measured(model, find_structure(model), batch.inputs))
    readers = {group.key: group.reads for group in structure.groups}
    monkeypatch.setattr(read_steps, "GRAM_BYTES", 0)
    assert len(read_steps.steps_of(Stream(model, structure, [batch]), readers)) == len(structure.order)


def test_curves_do_not_depend_on_the_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = small_model("resnet-torchvision")
    batches = batches_for(model, 3)
    structure = _whole(measured(model, find_structure(model), batches[0].inputs))
    section = PruneSection(budget=Budget(macs=0.5), score="magnitude")
    scores = score(model, structure, (), section, seed=0).values
    least = {group.key: 1 for group in structure.groups}
    found = []
    for size in (0, 1 << 28):
        monkeypatch.setattr(read_steps, "GRAM_BYTES", size)
        found.append(loss_curves(model, structure, scores, batches[:2], batches[2:], RepairSettings(True), least=least))
    for key in found[0]:
        np.testing.assert_allclose(found[0][key], found[1][key], rtol=1e-9)
