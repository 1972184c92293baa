"""Calibration batches of different lengths become one shape."""

from __future__ import annotations

import numpy as np

from optin_export.export.calibration import alike


def test_batches_are_padded_behind_to_the_longest() -> None:
    rows = [{"ids": np.full((2, size), size), "one": np.ones(2)} for size in (3, 5)]
    result = alike(rows)
    assert [batch["ids"].shape for batch in result] == [(2, 5), (2, 5)]
    assert result[0]["ids"].tolist() == [[3, 3, 3, 0, 0]] * 2
    assert all(batch["one"].tolist() == [1, 1] for batch in result)
