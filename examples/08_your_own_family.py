"""An architecture of your own: say where its units are, and everything else works on it.

The recipe names this file (`py:FILE.py:FUNCTION`), and importing it registers the family.
"""

import os
from pathlib import Path

import numpy as np
import torch
from torch import nn

import optin_export
from optin_export.units import Family, Producer, UnitGroup, register


class MixerBlock(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm, self.widen, self.narrow = nn.LayerNorm(width), nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, stream: torch.Tensor) -> torch.Tensor:
        return stream + self.narrow(nn.functional.gelu(self.widen(self.norm(stream))))


def network(width: int = 32, hidden: int = 96, depth: int = 3, classes: int = 5) -> nn.Module:
    """What the recipe names as model: [batch, 3, 16, 16] -> logits [batch, classes]."""
    torch.manual_seed(0)
    blocks = [MixerBlock(width, hidden) for _ in range(depth)]
    return nn.Sequential(nn.Flatten(), nn.Linear(768, width), *blocks, nn.LayerNorm(width), nn.Linear(width, classes))


def groups(block: MixerBlock, path: str, index: int) -> tuple[UnitGroup, ...]:
    """Neurons: outputs of `widen`, inputs of `narrow`, whose output is added to what `norm` reads."""
    return (
        UnitGroup(
            block=index, kind="neurons", count=block.widen.out_features, width=1,
            producers=(Producer(f"{path}.widen"),), consumer=f"{path}.narrow", residual=(f"{path}.norm", 0),
            sublayer=None,
        ),
    )  # fmt: skip


def is_block(module: nn.Module) -> bool:
    return type(module).__name__ == "MixerBlock"


register(
    Family(name="mixer", library="timm", examples="see this file", units=("neurons",), is_block=is_block, groups=groups)
)

if __name__ == "__main__":
    out = Path(os.environ.get("OUT", "runs/examples"))
    out.mkdir(parents=True, exist_ok=True)
    images = np.random.default_rng(0).integers(0, 256, (64, 16, 16, 3), dtype=np.uint8)
    np.savez(out / "images.npz", images=images)
    report = optin_export.run(
        {
            "recipe": 1,
            "name": "mixer",
            "model": {
                "source": f"py:{Path(__file__).resolve()}:network",
                "task": "image-classification",
                "preprocess": {"size": [16, 16], "mean": [0.5], "std": [0.5]},
            },
            "data": {"calibration": {"source": f"npz:{(out / 'images.npz').resolve()}"}},
            "prune": {"budget": {"macs": 0.7}, "probes": 16, "align": 4},
            "export": {"batch": [1]},
        },
        out=out / "mixer",
    )
    assert report is not None and report.verdict.passed
    print(f"{report.macs.ratio:.1%} of the MACs left, {report.latency[0].speedup.median:.2f}x as fast")
    pruned = optin_export.load_model(out / "mixer" / "model", trust_python=True)  # it runs this file
    print([layer.weight.shape for name, layer in pruned.named_modules() if name.endswith("widen")])
