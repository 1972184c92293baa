"""A metric of your own: one statistic per row, and the value of any set of rows; the interval comes from resampling.

Here: how often the right digit is among the two likeliest, and how much of that a smaller model loses.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from safetensors.torch import load_file

import optin_export as oe
from optin_export.measure import METRICS, Metric, evaluate


def among_two(outputs: np.ndarray, labels: Sequence[Any], inputs: Mapping[str, np.ndarray]) -> np.ndarray:
    """outputs [rows, classes] -> [rows], 1 where the label is one of the two largest."""
    two = np.argsort(-outputs, axis=-1)[:, :2]
    return (two == np.asarray(labels, dtype=int)[:, None]).any(-1).astype(float)


METRICS["top2"] = Metric(among_two, lambda statistics: 100 * float(statistics.mean()))

FOLDER = Path(__file__).parent.parent / "recipes" / "quickstart"
network = timm.create_model(
    "vit_tiny_patch16_224", img_size=32, patch_size=4, in_chans=1, num_classes=10, embed_dim=128, depth=4, num_heads=8
).eval()
network.load_state_dict(load_file(FOLDER / "digits_vit.safetensors"))
digits = np.load(FOLDER / "digits.npz")


def prepared(images: np.ndarray) -> torch.Tensor:
    """What the network was trained on: [rows, 1, 32, 32], -1 to 1."""
    large = torch.nn.functional.interpolate(torch.from_numpy(images)[:, None].float(), (32, 32), mode="bilinear")
    return large / 127.5 - 1


few = {"probes": 16, "score_samples": 32, "curve_samples": 32}  # of everything, to be done in seconds
small = oe.prune(network, prepared(digits["train_images"][:128]), macs=0.3, **few)
held_out, labels = prepared(digits["test_images"][:200]), digits["test_labels"][:200]
with torch.no_grad():
    rows = [among_two(model(held_out).numpy(), labels, {}) for model in (network, small.model)]
found = evaluate(*rows, "top2", seed=0)
print(f"top 2: {found.base:.2f} unpruned, {found.pruned:.2f} with 30 % of the MACs")
print(f"drop {found.drop:.2f} points, 95 % interval {found.drop_low:.2f} to {found.drop_high:.2f}")
