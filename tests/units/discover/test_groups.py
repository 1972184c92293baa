"""Found groups hold what families declare: measurement sees the same layers, the same units and the same rows."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from optin_export.units import Structure, UnitGroup, find_structure
from optin_export.units.discovery import found_structure
from optin_export.units.trace import observe_pass
from tests.units.discover import nets
from tests.units.models import MODELS, inputs_for, small_model
from tests.units.test_families import FIRST, by_tier

#: Families whose attention lists its heads, to read a table of all blocks: a buffer, without gradient.
LISTED = {"mpnet"}
#: Models whose declared neurons are made and read by convolutions of one position: measurement names them channels.
POINTWISE = {"convnext-conv-mlp"}


def found(name: str) -> tuple[Structure, Structure]:
    """(found, declared)."""
    model, _ = small_model(name)
    inputs = inputs_for(model, 2, 0)
    return found_structure(model, inputs, observe_pass(model, inputs), None), find_structure(model)


def rows(group: UnitGroup) -> dict[str, list[list[int]]]:
    return {one.path: [group.rows_of(one, [unit]) for unit in range(group.count)] for one in group.producers}


@pytest.mark.parametrize("name", by_tier(FIRST, *MODELS, others=pytest.mark.slow))
def test_declared_groups_are_found(name: str) -> None:
    measured, declared = found(name)
    by_consumer = {group.consumer: group for group in measured.groups}
    assert {group.consumer for group in declared.groups} <= by_consumer.keys()
    for group in declared.groups:
        same = by_consumer[group.consumer]
        assert (same.count, same.width) == (group.count, group.width), group.key
        assert same.kind == ("channels" if name in POINTWISE else group.kind), group.key
        assert rows(same) == rows(group), group.key
        assert set(same.readers) == set(group.readers), group.key
        assert {one.path: one.norm for one in same.producers} == {one.path: one.norm for one in group.producers}
        tables = set() if MODELS[name][0] in LISTED else {one.path for one in group.tables}
        assert {one.path for one in same.tables} == tables, group.key


def test_rows_are_named_one_by_one_only_where_they_are_no_slabs() -> None:
    def producer(model: nets.Net) -> tuple[int, int | None, bool]:
        inputs = nets.tokens()
        structure = found_structure(model, inputs, observe_pass(model, inputs), None)
        one = structure.groups[0].producers[0]
        return one.fused, one.rows, one.index is not None

    assert producer(nets.fused_attention(interleaved=False)) == (3, 2, False)
    assert producer(nets.fused_attention(interleaved=True)) == (1, 6, False)
    assert producer(nets.permuted()) == (1, None, True)


def test_layers_that_no_row_reaches_have_no_units() -> None:
    """As those of a table of relative positions in Swin v2: removing their units would save nothing in an engine."""
    model = nets.net(
        lambda s, x: s.head(s.norm(s.fc2(s.fc1(x).relu()) + s.table2(s.table1(s.places).relu()))),
        norm=nn.LayerNorm(nets.WIDTH),
        places=nn.Parameter(torch.zeros(nets.TOKENS, 2)),
        table1=nn.Linear(2, 6),
        table2=nn.Linear(6, nets.WIDTH),
        fc1=nn.Linear(nets.WIDTH, 8),
        fc2=nn.Linear(8, nets.WIDTH),
        head=nn.Linear(nets.WIDTH, 3),
    )
    structure = found_structure(model, nets.tokens(), None, None)
    assert [group.consumer for group in structure.groups] == ["fc2"]
