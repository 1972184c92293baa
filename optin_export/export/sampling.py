"""Bilinear sampling out of plain gathers, in place of GridSample, for the time of an export.

TensorRT evaluates GridSample wrongly for batches in which rows are equal (NVIDIA/TensorRT issue 4813); a gather of rows
is known to every engine.
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
    x, y = (_pixels(grid[..., axis], size, bool(align_corners)) for axis, size in ((0, width), (1, height)))
    left, top = x.floor(), y.floor()
    rows = image.flatten(2).mT.reshape(-1, channels)  # [n * H * W, channels]
    start = (torch.arange(count, device=image.device) * (height * width)).view(-1, 1, 1)
    total = None
    for column, row in ((left, top), (left + 1, top), (left, top + 1), (left + 1, top + 1)):
        share = (1 - (x - column).abs()) * (1 - (y - row).abs())
        inside = (column >= 0) & (column <= width - 1) & (row >= 0) & (row <= height - 1)
        place = row.clamp(0, height - 1).long() * width + column.clamp(0, width - 1).long()
        picked = F.embedding((start + place).flatten(), rows).view(*grid.shape[:3], channels)
        part = picked * (share * inside.to(share.dtype)).unsqueeze(-1)
        total = part if total is None else total + part
    assert total is not None
    return total.permute(0, 3, 1, 2)


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
