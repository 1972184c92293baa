"""Bilinear sampling with plain gathers, which replaces GridSample during an export.

TensorRT evaluates GridSample wrongly for batches with equal rows (NVIDIA/TensorRT issue 4813); every engine supports a
gather of rows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch.nn import functional as F


def sample(
    image: torch.Tensor,
    grid: torch.Tensor,
    mode: str = "bilinear",
    padding_mode: str = "zeros",
    align_corners: bool | None = None,
) -> torch.Tensor:
    """torch.nn.functional.grid_sample for images, bilinear with zeros outside.

    image: [n, channels, H, W]; grid: [n, h, w, 2], x and y in -1..1; returns [n, channels, h, w].
    Raises NotImplementedError for other modes.
    """
    if image.dim() != 4 or mode != "bilinear" or padding_mode != "zeros":
        raise NotImplementedError(f"grid_sample of {image.dim() - 2} dimensions, {mode}, {padding_mode}")
    count, channels, height, width = image.shape
    columns = _neighbours(_pixels(grid[..., 0], width, bool(align_corners)), width)
    lines = _neighbours(_pixels(grid[..., 1], height, bool(align_corners)), height)
    rows = image.flatten(2).mT.reshape(-1, channels)  # [n * H * W, channels]
    start = (torch.arange(count, device=image.device) * (height * width)).view(-1, 1, 1)
    parts = []
    for line, share in lines:
        for column, part in columns:
            picked = F.embedding((start + line * width + column).flatten(), rows).view(*grid.shape[:3], channels)
            parts.append(picked * (share * part).unsqueeze(-1))
    return (parts[0] + parts[1] + parts[2] + parts[3]).permute(0, 3, 1, 2)


def _neighbours(place: torch.Tensor, size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The two pixels next to each position along one axis, with their weights: 0 for pixels outside the image."""
    low = place.floor()
    found = []
    for pixel, share in ((low, low + 1 - place), (low + 1, place - low)):
        inside = (pixel >= 0) & (pixel <= size - 1)
        # Not clamp: the exporter's optimiser fuses chains of it into nodes out of order.
        found.append((torch.where(inside, pixel, 0.0).long(), torch.where(inside, share, 0.0)))
    return found


def _pixels(values: torch.Tensor, size: int, align_corners: bool) -> torch.Tensor:
    """-1..1 to pixel indices."""
    return (values + 1) * ((size - 1) / 2) if align_corners else ((values + 1) * size - 1) / 2


@contextlib.contextmanager
def sampling_by_gather() -> Iterator[None]:
    """torch.nn.functional.grid_sample is `sample` within the body."""
    original = F.grid_sample
    F.grid_sample = sample  # type: ignore[assignment]
    try:
        yield
    finally:
        F.grid_sample = original
