"""What the repair is worth: the same budget with and without it, on held-out images of digits.

The repair is least squares on unlabelled calibration rows, layer by layer; no gradient step is taken.
"""

from pathlib import Path

import numpy as np
import timm
import torch
from safetensors.torch import load_file

import optin_export as oe

FOLDER = Path(__file__).parent.parent / "recipes" / "quickstart"
network = timm.create_model(
    "vit_tiny_patch16_224", img_size=32, patch_size=4, in_chans=1, num_classes=10, embed_dim=128, depth=4, num_heads=8
)
network.load_state_dict(load_file(FOLDER / "digits_vit.safetensors"))
digits = np.load(FOLDER / "digits.npz")


def prepared(images: np.ndarray) -> torch.Tensor:
    """What the network was trained on: [rows, 1, 32, 32], -1 to 1."""
    large = torch.nn.functional.interpolate(torch.from_numpy(images)[:, None].float(), (32, 32), mode="bilinear")
    return large / 127.5 - 1


calibration = prepared(digits["train_images"][:128])
few = {"probes": 16, "score_samples": 32, "curve_samples": 32}  # of everything, to be done in seconds
held_out = [(prepared(digits["test_images"][:300]), digits["test_labels"][:300])]

points = {}
for repair in (False, True):
    small = oe.prune(network, calibration, macs=0.2, repair=repair, evaluation=held_out, **few)
    found = small.report["accuracy"]
    points[repair] = found["pruned"]
    print(f"{'repaired' if repair else 'as cut'}: {found['pruned']:.2f} % right, unpruned {found['base']:.2f} %")
assert points[True] > points[False]  # 80 % of the MACs are gone

for key, found in small.report["repair"]["repairs"].items():
    print(f"  {key:16} squared error on the residual stream {found['before']:.3g} -> {found['after']:.3g}")
