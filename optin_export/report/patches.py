"""Draw over an image which of its patches were merged into one token."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from optin_export.report.plots import INK, render

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def merged_patches(pixels: np.ndarray, places: np.ndarray) -> str:
    """An `<svg>` with images above, and below them with merged patches in their mean colour and lines between others.

    pixels: [images, height, width, 1 or 3], of any range. places: [images, tokens], equal where tokens were merged; the
    last of them are the patches, row by row. "" where the patches are no grid.
    """
    grid = _grid(places.shape[1], pixels.shape[1], pixels.shape[2])
    if grid is None:
        return ""
    count = len(pixels)

    def draw(figure: Figure) -> None:
        axes = figure.subplots(2, count, squeeze=False)
        for column in range(count):
            image = _as_colours(pixels[column])
            patches = places[column, -grid[0] * grid[1] :].reshape(grid)
            for row, shown in enumerate((image, _averaged(image, patches))):
                panel = axes[row][column]
                panel.imshow(shown, interpolation="none")
                panel.set(xticks=[], yticks=[])
                for spine in panel.spines.values():
                    spine.set_visible(False)
            height, width = image.shape[0] / grid[0], image.shape[1] / grid[1]
            for y, x in np.argwhere(patches[1:] != patches[:-1]):
                axes[1][column].plot(
                    [x * width - 0.5, (x + 1) * width - 0.5], [(y + 1) * height - 0.5] * 2, color=INK, lw=0.7
                )
            for y, x in np.argwhere(patches[:, 1:] != patches[:, :-1]):
                axes[1][column].plot(
                    [(x + 1) * width - 0.5] * 2, [y * height - 0.5, (y + 1) * height - 0.5], color=INK, lw=0.7
                )

    left = ", ".join(str(len(np.unique(row[-grid[0] * grid[1] :]))) for row in places)
    label = f"{count} images of {grid[0]} x {grid[1]} patches and what was merged; groups of patches left: {left}"
    return render("places", label, 3.6, draw)


def _grid(tokens: int, height: int, width: int) -> tuple[int, int] | None:
    """Rows and columns of the patches among the tokens: the largest grid that fits, after a short prefix."""
    for patches in range(tokens, max(tokens - 17, tokens // 2), -1):
        rows = round((patches * height / width) ** 0.5)
        if rows and patches % rows == 0 and height % rows == 0 and width % (patches // rows) == 0:
            return rows, patches // rows
    return None


def _as_colours(pixels: np.ndarray) -> np.ndarray:
    """[height, width, 3] in 0..1, scaled to the image's own range, which preprocessing has changed."""
    low, high = float(pixels.min()), float(pixels.max())
    return np.broadcast_to((pixels - low) / max(high - low, 1e-9), (*pixels.shape[:2], 3))


def _averaged(image: np.ndarray, patches: np.ndarray) -> np.ndarray:
    """Every pixel in the mean colour of all patches of its group."""
    each = np.kron(
        patches, np.ones((image.shape[0] // patches.shape[0], image.shape[1] // patches.shape[1]), dtype=int)
    )
    result = np.empty_like(image)
    for group in np.unique(patches):
        result[each == group] = image[each == group].mean(0)
    return result
