"""CamVid street scenes (480 x 360, label maps of 11 classes) below $OPTIN_EXPORT_SHARED/data/camvid.

Three drives, in order of time. Of each the first two thirds were trained on and serve for calibration, without their
labels; the last third is held out for every accuracy that is reported.
"""

from __future__ import annotations

import itertools
import os
from pathlib import Path

FOLDERS = ("train", "dev")


def scenes() -> tuple[list[Path], list[Path]]:
    """Images to learn from, and images held out."""
    root = Path(os.environ.get("OPTIN_EXPORT_SHARED", Path(__file__).resolve().parents[3] / "shared"))
    images = [path for folder in FOLDERS for path in sorted((root / "data" / "camvid" / folder).glob("*.jpg"))]
    if not images:
        raise FileNotFoundError(f"no images below {root}/data/camvid; set OPTIN_EXPORT_SHARED to what holds data/")
    learned: list[Path] = []
    held_out: list[Path] = []
    for _, drive in itertools.groupby(images, lambda path: path.name.partition("_")[0]):
        parts = list(drive)
        learned += parts[: 2 * len(parts) // 3]
        held_out += parts[2 * len(parts) // 3 :]
    return learned, held_out


def map_of(image: Path) -> Path:
    """The label map of a scene: 0..10, and 11 for what is not evaluated."""
    return image.parent.with_name(f"{image.parent.name}annot") / f"{image.stem}.png"


def calibration() -> dict[str, list[Path]]:
    """Unlabelled scenes."""
    return {"image": scenes()[0]}


def held_out() -> dict[str, list[Path]]:
    """Scenes never seen in training or calibration, and their label maps."""
    images = scenes()[1]
    return {"image": images, "label": [map_of(image) for image in images]}
