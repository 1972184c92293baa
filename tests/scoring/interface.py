"""What every scorer has to do, those of the studies too."""

from __future__ import annotations

import numpy as np
import torch

from optin_export.recipe import Budget, PruneSection
from optin_export.scoring import score
from optin_export.units import find_structure
from tests.units.models import batches_for, small_model


def check_scorer(name: str, method: str) -> None:
    """A finite number for every unit, the same for the same seed, and units that differ."""
    model, _ = small_model(name)
    structure, batches = find_structure(model), batches_for(model, 2, size=2)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    settings = PruneSection(budget=Budget(macs=0.5), probes=8, rows=128).model_copy(update={"score": method})
    first, second = (score(model, structure, batches, settings, seed=3) for _ in range(2))
    for group in structure.groups:
        values = first.values[group.key]
        assert values.shape == (group.count,) and values.dtype == np.float64
        assert np.isfinite(values).all() and values.min() >= 0
        assert len(np.unique(values)) > 1
        assert np.array_equal(values, second.values[group.key])
    assert list(first.values) == [group.key for group in structure.groups]
    assert first.info == second.info and first.info["without_effect"] >= 0
    # The model is as it was: no hook, no shadowed forward, no gradient, the same weights.
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not any("forward" in vars(module) for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
