"""Which heads and neurons of a model matter? Any torch module whose architecture a family knows; no labels, no recipe.

Here the weights are random, so that nothing is downloaded: use your own model and your own inputs in their place.
"""

import numpy as np
import timm
import torch

from optin_export.data import Batch
from optin_export.models import wrap
from optin_export.recipe import Budget, PruneSection
from optin_export.scoring import score
from optin_export.units import find_structure

torch.manual_seed(0)
network = timm.create_model(
    "vit_tiny_patch16_224", pretrained=False, img_size=64, embed_dim=64, depth=3, num_heads=4, num_classes=10
)
model = wrap(network, "image-classification")  # named tensors in, one tensor out; eval mode, float32

# A batch is the arguments of the model by name, and the rows of the data they come from.
batches = [Batch({"pixel_values": torch.randn(16, 3, 64, 64)}, np.arange(16)) for _ in range(2)]

structure = find_structure(model)  # the blocks, and every unit that may go
settings = PruneSection(budget=Budget(macs=0.5), probes=16)  # the budget is of no account to the scores
scores = score(model, structure, batches, settings, seed=0)

print(f"family {structure.family}, {len(structure.blocks)} blocks; {scores.info}")
for group in structure.groups:
    values = scores.values[group.key]  # float64 [units], larger is more important
    order = np.argsort(values)
    least, most = (f"{unit} ({values[unit]:.2e})" for unit in (order[0], order[-1]))
    print(f"{group.key:16} {group.count:4} units, least important {least}, most {most}")
