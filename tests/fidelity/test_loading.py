"""Through the real command: labels are what the user's own model says, so the unpruned engine is right on all."""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from optin_export.cli import main
from tests.conftest import VIT_ARGS, enlarge, measured_shortly

ROWS = 60
NET = """
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
class BasicBlock(nn.Module):
    def __init__(self, width, wrap):
        super().__init__()
        self.conv1, self.bn1 = wrap(nn.Conv2d(width, width, 3, padding=1, bias=False)), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = wrap(nn.Conv2d(width, width, 3, padding=1, bias=False)), nn.BatchNorm2d(width)
    def forward(self, x):
        return torch.relu(x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))
class Net(nn.Module):
    def __init__(self, wrap):
        super().__init__()
        self.stem = wrap(nn.Conv2d(3, 16, 3, padding=1))
        self.blocks = nn.Sequential(*[BasicBlock(16, wrap) for _ in range(2)])
        self.head = nn.Linear(16, 5)
    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))
def make(kind="weight_norm"):
    torch.manual_seed(0)
    wrap = {"weight_norm": weight_norm, "spectral_norm": spectral_norm, "old": nn.utils.weight_norm}[kind]
    net = nn.SyncBatchNorm.convert_sync_batchnorm(Net(wrap))
    with torch.no_grad():
        for part in net.modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm):
                part.running_mean.normal_(0, 0.2); part.running_var.uniform_(0.2, 1.5); part.bias.normal_(0, 0.3)
        for name, tensor in net.named_parameters():
            if name.endswith(("original0", "_g")):
                tensor.mul_(torch.rand_like(tensor) * 3 + 0.5)
        net.head.weight.mul_(5)
        x = torch.linspace(-1, 1, 3 * 64).reshape(64, 3, 1, 1).expand(64, 3, 8, 8)
        net.head.bias.sub_(net.eval()(x).mean(0))
    return net
"""


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    """Each of a colour of its own, with noise."""
    generator = np.random.default_rng(0)
    colours = generator.integers(0, 256, (ROWS, 1, 1, 3))
    return (colours + generator.integers(-40, 40, (ROWS, 16, 16, 3))).clip(0, 255).astype(np.uint8)


def labels_of(model: torch.nn.Module, images: np.ndarray) -> np.ndarray:
    """As a plain loop says, and clearly: several classes occur."""
    pixels = torch.from_numpy(images).float().permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        labels = model.eval()((pixels - 0.5) / 0.5).argmax(1).numpy()
    assert len(np.unique(labels)) > 1
    return labels


def accuracy(model: dict[str, Any], images: np.ndarray, labels: np.ndarray, folder: Path, warns: str = "") -> float:
    """Of the unpruned engine, by the command."""
    np.savez(folder / "rows.npz", images=images, labels=labels)
    source = {"source": f"npz:{folder / 'rows.npz'}"}
    raw = {
        "recipe": 1,
        "name": "own",
        "model": {
            "task": "image-classification",
            "preprocess": {"size": list(images.shape[1:3]), "mean": [0.5] * 3, "std": [0.5] * 3},
            **model,
        },
        "data": {"calibration": source, "evaluation": {**source, "metric": "accuracy"}},
        "prune": {"budget": {"macs": 0.7}, "probes": 4, "score_samples": 8, "curve_samples": 8},
        "gates": {"speedup": 0.01, "accuracy_drop": 100},
        "export": {"batch": [1, 2]},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(raw))
    with measured_shortly():
        assert main([str(folder / "recipe.yaml"), "--out", str(folder / "run"), "-q"]) == 0
    report = json.loads((folder / "run" / "report.json").read_text())
    assert warns in "; ".join(report["warnings"])
    return float(report["accuracy"]["base"])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["spectral_norm", "old"])
def test_computed_weights_and_synchronised_batch_norms(kind: str, images: np.ndarray, tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(NET)
    spec = importlib.util.spec_from_file_location("net", tmp_path / "net.py")
    assert spec is not None and spec.loader is not None
    net = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(net)
    labels = labels_of(net.make(kind), images)
    model = {"source": f"py:{tmp_path / 'net.py'}:make", "args": {"kind": kind}}
    assert accuracy(model, images, labels, tmp_path) == 100


def test_a_checkpoint_of_timms_training_script(images: np.ndarray, tmp_path: Path) -> None:
    """In DistributedDataParallel, compiled, with its options, an optimizer and an average of the weights."""
    import timm

    args = {**VIT_ARGS, "img_size": 16, "in_chans": 3}
    last, average = (enlarge(timm.create_model("vit_tiny_patch16_224", **args), seed) for seed in (1, 2))
    written = {
        "epoch": 1,
        "arch": "vit_tiny_patch16_224",
        "state_dict": {f"module._orig_mod.{name}": tensor for name, tensor in last.state_dict().items()},
        "state_dict_ema": {f"module.{name}": tensor for name, tensor in average.state_dict().items()},
        "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": []},
        "args": argparse.Namespace(lr=0.1),
        "metric": np.float64(1),
    }
    torch.save(written, tmp_path / "model_best.pth.tar")
    reference = timm.create_model("vit_tiny_patch16_224", **args)
    timm.models.load_checkpoint(reference, str(tmp_path / "model_best.pth.tar"), weights_only=False)
    model = {"source": "timm:vit_tiny_patch16_224", "args": args, "weights": "model_best.pth.tar"}
    labels = labels_of(reference, images)
    assert accuracy(model, images, labels, tmp_path, warns="took 'state_dict_ema'") == 100
