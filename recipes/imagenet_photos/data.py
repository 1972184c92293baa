"""Photos of ImageNet's classes below $OPTIN_EXPORT_SHARED/data: 1,000 for calibration, 500 others with labels.

The labelled photos are easier than ImageNet's validation set: quote the points lost, not the accuracy.
"""

from __future__ import annotations

import csv
import os
from pathlib import Path


def _data() -> Path:
    root = Path(os.environ.get("OPTIN_EXPORT_SHARED", Path(__file__).resolve().parents[3] / "shared")) / "data"
    if not (root / "imagenet_nips2017").is_dir():
        raise FileNotFoundError(f"no photos below {root}; set OPTIN_EXPORT_SHARED to the folder that holds data/")
    return root


def calibration() -> dict[str, list[Path]]:
    """1,000 unlabelled photos, one per class."""
    return {"image": sorted((_data() / "imagenet_calibration").glob("*.jpg"))}


def held_out() -> dict[str, list]:
    """500 photos and the indices of their classes."""
    folder = _data() / "imagenet_nips2017"
    with (folder / "dev.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {"image": [folder / "dev" / row["file"] for row in rows], "label": [int(row["label"]) for row in rows]}
