"""CoaT, whose heads follow its weights, computes what timm's does, and loses heads in all blocks of a stage."""

from __future__ import annotations

import copy

import timm
import torch

from optin_export.models import wrap
from optin_export.models.equivalents import use_equivalents
from optin_export.pruning import verified
from optin_export.units import find_structure
from tests.conftest import enlarge


def test_outputs_and_lost_heads_are_right() -> None:
    sizes = {"embed_dims": (16,) * 4, "serial_depths": (2, 1, 1, 1), "parallel_depth": 0, "num_heads": 4}
    sizes |= {"crpe_window": {3: 2, 5: 2}, "img_size": 32, "return_interm_layers": False, "num_classes": 3}
    model = enlarge(timm.create_model("coat_lite_tiny", **sizes)).eval()
    same = copy.deepcopy(model)
    use_equivalents(same)
    inputs = {"pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))}
    with torch.no_grad():
        torch.testing.assert_close(same(inputs["pixel_values"]), model(inputs["pixel_values"]), rtol=1e-5, atol=1e-6)
    task = wrap(same, "image-classification")
    structure = verified(task, find_structure(task, inputs=inputs), inputs)
    # Two windows; their convolutions are those of both blocks of the first stage.
    own = [group for group in structure.groups if "serial_blocks1" in group.consumer and group.width == 4]
    assert [(group.count, len(group.reads)) for group in own] == [(2, 2), (2, 2)]
