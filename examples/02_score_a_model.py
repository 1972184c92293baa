"""Which heads and neurons of a model matter? Any timm or transformers model and unlabelled rows; no recipe.

Here the weights are random, so that nothing is downloaded: use your own model and your own inputs in their place.
"""

import numpy as np
import timm
import torch

import optin_export as oe

torch.manual_seed(0)
network = timm.create_model(
    "vit_tiny_patch16_224", pretrained=False, img_size=64, embed_dim=64, depth=3, num_heads=4, num_classes=10
)
images = torch.randn(32, 3, 64, 64)

small = oe.prune(network, images, macs=0.5)

for name, values in small.scores.items():  # float64 [units], larger is more important
    order = np.argsort(values)
    least, most = (f"{unit} ({values[unit]:.2e})" for unit in (order[0], order[-1]))
    kept = len(small.plan.groups[name].kept)
    print(f"{name:16} {len(values):4} units, least important {least}, most {most}; {kept} stay")
