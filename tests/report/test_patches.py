"""Patches that were merged, drawn over images."""

from __future__ import annotations

import numpy as np
import pytest

from optin_export.report.patches import _averaged, _grid, merged_patches


def test_the_grid_is_that_of_the_patches_behind_the_prefix() -> None:
    assert _grid(65, 32, 32) == (8, 8)
    assert _grid(197, 224, 224) == (14, 14)
    assert _grid(4 + 2 + 8, 16, 32) == (2, 4)  # four registers, a class and a distillation token
    assert _grid(64, 32, 32) == (8, 8)


def test_merged_patches_take_their_mean_colour() -> None:
    image = np.zeros((4, 4, 3))
    image[:2, :2], image[2:, 2:] = 1.0, 0.5
    averaged = _averaged(image, np.array([[0, 1], [2, 0]]))
    assert np.allclose(averaged[:2, :2], 0.75) and np.allclose(averaged[2:, 2:], 0.75)
    assert np.allclose(averaged[:2, 2:], 0.0) and np.allclose(averaged[2:, :2], 0.0)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_drawing_says_what_is_left_and_is_reproducible(channels: int) -> None:
    pixels = np.random.default_rng(0).normal(size=(2, 32, 32, channels)).astype(np.float32)
    places = np.tile(np.arange(17), (2, 1))
    places[1, 5:] = 5
    svg = merged_patches(pixels, places)
    assert svg.startswith("<svg") and svg.endswith("</svg>")
    assert "groups of patches left: 16, 5" in svg
    assert svg == merged_patches(pixels, places)


def test_tokens_that_are_no_grid_are_not_drawn() -> None:
    assert merged_patches(np.zeros((1, 7, 7, 1), dtype=np.float32), np.zeros((1, 3), dtype=np.int64)) == ""
