"""Indices in architecture.json: short where they follow a rule, and read as they were written."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from pydantic import BaseModel

from optin_export.errors import InputError
from optin_export.pruning.saved_indices import Index, extent, short, written_out


class File(BaseModel):
    index: Index


def read(index: Any) -> Index:
    """As it is in the file."""
    written = File(index=index).model_dump_json()
    return File.model_validate(json.loads(written)).index


def fused(heads: int, width: int) -> list[list[int]]:
    """Rows of queries, keys and values, one after another, per head."""
    return [[part * heads * width + head * width + row for part in range(3) for row in range(width)]
            for head in range(heads)]  # fmt: skip


SHUFFLED = [[row] for row in random.Random(0).sample(range(50), 50)]
INDICES = {
    "consecutive": [[row] for row in range(64, 96)],
    "every third": [[3 * row] for row in range(32)],
    "the same": [[7]] * 5,
    "pairs at a distance": [[row, row + 32] for row in range(32)],
    "queries, keys and values": fused(heads=4, width=8),
    "backwards": [[row] for row in range(20, 0, -1)],
    "shuffled": SHUFFLED,
    "two runs and others": [[0], [1], [2], [9], [4], [20], [21], [22], [23]],
    "unsorted rows": [[5, 3, 4], [15, 13, 14], [25, 23, 24]],
    "one": [[3]],
}


@pytest.mark.parametrize("name", INDICES)
def test_what_is_read_is_what_was_written(name: str) -> None:
    index = INDICES[name]
    again = read(short(index))
    assert written_out(again, len(index)) == tuple(map(tuple, index))
    rows = [row for unit in index for row in unit]
    assert extent(again) == (len(rows), max(rows) + 1)


@pytest.mark.parametrize("name", ["consecutive", "every third", "pairs at a distance", "queries, keys and values"])
def test_a_rule_is_written_once(name: str) -> None:
    found = short(INDICES[name])
    assert found is not None
    assert len(found) == 1


def test_files_of_earlier_versions_hold_units_one_by_one() -> None:
    index = File.model_validate({"index": [[[4, 2]], [[6, 2]], [[8, 1], [11, 1]]]}).index
    assert written_out(index, 3) == ((4, 5), (6, 7), (8, 11))


@pytest.mark.parametrize(
    "index",
    [
        [{"units": 1 << 31, "step": 1, "runs": [[0, 1]]}],
        [{"units": 3, "step": 1, "runs": [[0, 1]]}],
        [{"units": 3, "step": 1, "runs": [[0, 1]]}, [[9, 2]]],
    ],
)
def test_rows_of_other_units_are_refused(index: Any) -> None:
    with pytest.raises(InputError, match="damaged"):
        written_out(File.model_validate({"index": index}).index, 4)


def test_the_extent_counts_rows_that_are_not_written_out() -> None:
    index = File.model_validate({"index": [{"units": 1 << 31, "step": 1 << 31, "runs": [[5, 1 << 31]]}]}).index
    assert extent(index) == (1 << 62, 5 + (1 << 31) + (1 << 31) * ((1 << 31) - 1))
    empty = File.model_validate({"index": [{"units": 1 << 31, "step": 0, "runs": []}]}).index
    assert extent(empty)[0] == 1 << 31
