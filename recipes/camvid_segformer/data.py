"""CamVid street scenes (480 x 360, label maps of 11 classes) below $OPTIN_EXPORT_SHARED/data/camvid.

The 101 scenes of `train` were trained on and serve for calibration, without their labels; the 116 scenes of `dev` are
held out for every accuracy that is reported.
"""

from __future__ import annotations

import os
from pathlib import Path


def _part(name: str) -> tuple[Path, list[Path]]:
    root = Path(os.environ.get("OPTIN_EXPORT_SHARED", Path(__file__).resolve().parents[3] / "shared"))
    folder = root / "data" / "camvid"
    images = sorted((folder / name).glob("*.jpg"))
    if not images:
        raise FileNotFoundError(f"no images in {folder / name}; set OPTIN_EXPORT_SHARED to the folder that holds data/")
    return folder, images


def calibration() -> dict[str, list[Path]]:
    """Unlabelled scenes."""
    return {"image": _part("train")[1]}


def held_out() -> dict[str, list[Path]]:
    """Scenes never seen in training or calibration, and their label maps: 0..10, and 11 for what is not evaluated."""
    folder, images = _part("dev")
    return {"image": images, "label": [folder / "devannot" / f"{image.stem}.png" for image in images]}
