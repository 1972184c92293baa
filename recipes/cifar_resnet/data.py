"""CIFAR-10 images from two npz files (`images` uint8 [N, 32, 32, 3], `labels`) below $OPTIN_EXPORT_SHARED/data/cifar10.

The images of `test9k_fromjpeg.npz` belong to CIFAR-10's test part: the first 5,000 are free for calibration (without
their labels), the last 4,000 are held out for every accuracy that is reported.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

HELD_OUT = 4000


def _arrays(name: str) -> tuple[np.ndarray, np.ndarray]:
    root = os.environ.get("OPTIN_EXPORT_SHARED", Path(__file__).resolve().parents[3] / "shared")
    with np.load(Path(root) / "data" / "cifar10" / name, allow_pickle=False) as arrays:
        return arrays["images"], arrays["labels"].astype(np.int64)


def calibration() -> dict[str, np.ndarray]:
    """Unlabelled images: 5,000 of the kind that is held out."""
    images, _ = _arrays("test9k_fromjpeg.npz")
    return {"image": images[:-HELD_OUT]}


def held_out() -> dict[str, np.ndarray]:
    """4,000 images and their labels, never seen in training or calibration."""
    images, labels = _arrays("test9k_fromjpeg.npz")
    return {"image": images[-HELD_OUT:], "label": labels[-HELD_OUT:]}
