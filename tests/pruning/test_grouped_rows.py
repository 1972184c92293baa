"""Grouped convolutions that read a whole stream lose any of their output features, and compute the others as before."""

from __future__ import annotations

import copy
import json
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from optin_export.pruning import rebuild, verified
from optin_export.pruning.grouped_rows import cut_rows_of_groups
from optin_export.pruning.saved_units import SavedUnits, saved_units
from optin_export.search import GroupPlan
from optin_export.units import Structure, count_macs, find_structure, measure_costs
from tests.pruning.test_verify import check_plans

HEADS, WIDTH = 4, 16


class Attention(nn.Module):
    """Attention over [batch, features, positions] with grouped projections, as in SqueezeBERT."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Conv1d(WIDTH, WIDTH, 1, groups=groups) for _ in range(3))
        self.norm, self.proj = nn.LayerNorm(WIDTH), nn.Conv1d(WIDTH, WIDTH, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        stream = self.norm(x.mT).mT
        q, k, v = (layer(stream).unflatten(1, (-1, WIDTH // HEADS)).mT for layer in (self.q, self.k, self.v))
        mixed = (q @ k.mT / 2).softmax(-1) @ v
        return x + self.proj(mixed.mT.flatten(1, 2))


class Net(nn.Module):
    def __init__(self, groups: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.head = nn.Conv1d(3, WIDTH, 1), nn.Linear(WIDTH, 3)
        self.blocks = nn.Sequential(Attention(groups), Attention(groups))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.stem(x)).mean(-1))


def inputs() -> dict[str, torch.Tensor]:
    return {"x": torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(1))}


def found(groups: int) -> tuple[Any, Structure]:
    model: Any = Net(groups).eval().requires_grad_(False)
    return model, verified(model, find_structure(model, inputs=inputs()), inputs())


@pytest.mark.parametrize("groups", [2, 4])
def test_heads_of_grouped_projections_are_removed_exactly(groups: int) -> None:
    model, structure = found(groups)
    assert [(group.kind, group.count) for group in structure.groups] == [("heads", HEADS)] * 2
    assert all(one.keeps_inputs for group in structure.groups for one in group.producers)
    check_plans(model, structure, inputs())


@pytest.mark.parametrize("kept", [(0, 2), (0, 1), (1, 2, 3), (3,)])
@pytest.mark.parametrize("groups", [2, 4])
def test_a_pruned_model_is_copied_exported_loaded_and_counted(groups: int, kept: tuple[int, ...]) -> None:
    model, structure = found(groups)
    plans = {group.key: GroupPlan(count=group.count, kept=kept) for group in structure.groups}
    dense: Any = rebuild(model, structure, plans, inputs())[0]
    units = saved_units(structure)
    assert units is not None
    loaded = SavedUnits.model_validate(json.loads(units.model_dump_json())).structure(model, structure.family)
    axes = {"x": {0: torch.export.Dim("batch", max=9)}}
    others = [
        copy.deepcopy(dense),
        pickle.loads(pickle.dumps(dense)),
        rebuild(model, loaded, plans, inputs())[0],
        torch.export.export(dense, (), inputs(), dynamic_shapes=axes).module(),
    ]
    for other in others:
        torch.testing.assert_close(other(**inputs()), dense(**inputs()), rtol=1e-5, atol=1e-6)
    one = {"x": inputs()["x"][:1]}
    left = dict.fromkeys(plans, len(kept))
    assert measure_costs(model, structure, one).of("macs", left) == count_macs(dense, one)


@pytest.mark.parametrize("removed", [[0, 4], [0, 1, 2, 3, 5], [0, 1, 2, 3], [1]])
@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(6, 12, 3, padding=1, groups=3, padding_mode="reflect"),
        nn.Conv1d(6, 12, 3, stride=2, groups=3, bias=False),
        nn.Conv2d(12, 12, 3, padding="same", groups=12),
    ],
)
def test_features_that_stay_are_as_before(layer: Any, removed: list[int]) -> None:
    x = torch.randn(2, layer.in_channels, *[9] * len(layer.kernel_size))
    smaller, kept = copy.deepcopy(layer), [row for row in range(12) if row not in removed]
    cut_rows_of_groups(smaller, removed)
    for one in (x, x[0]):
        torch.testing.assert_close(smaller(one), layer(one)[..., kept, *[slice(None)] * len(layer.kernel_size)])
    assert smaller.out_channels == len(kept) == len(smaller.weight)
    # A model is loaded with the numbers of units that stay, not with which of them do: these are in its weights.
    loaded = copy.deepcopy(layer)
    cut_rows_of_groups(loaded, range(12 - len(removed), 12))
    loaded.load_state_dict(smaller.state_dict())
    torch.testing.assert_close(loaded(x), smaller(x))
    again = copy.deepcopy(smaller)
    cut_rows_of_groups(again, [1])
    torch.testing.assert_close(again(x), smaller(x)[:, [0, *range(2, len(kept))]])


def test_groups_of_equal_size_stay_one_convolution() -> None:
    layer = nn.Conv1d(6, 12, 1, groups=3)
    cut_rows_of_groups(layer, [0, 4, 11])
    assert layer.groups == 3 and layer.weight.shape == (9, 2, 1)
    with FlopCounterMode(display=False) as counter:
        layer(torch.randn(1, 6, 5))
    assert len(counter.get_flop_counts()["Global"]) == 1 and counter.get_total_flops() == 2 * 9 * 2 * 5


def test_groups_of_damaged_weights_are_refused() -> None:
    layer = nn.Conv1d(6, 12, 1, groups=3)
    cut_rows_of_groups(layer, [0])
    with pytest.raises(ValueError, match="has groups of"):
        layer.load_state_dict(layer.state_dict() | {"rows_of_groups": torch.tensor([4, 4, 4])})
