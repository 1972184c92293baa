"""The real command on image files that the library itself labelled: the unpruned model gets every one of them right.

A model with large random weights changes its answer when its pixels change, so 100 means that they are the library's.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from optin_export.cli import main
from tests.conftest import VIT_ARGS, enlarge
from tests.data.test_hub_images import EDGE, SQUARE, photo, processor_folder

CLASSES = 40
#: Height and width, mode, format, EXIF orientation of the images.
FILES = [
    ((50, 70), "RGB", "PNG", 1),
    ((70, 50), "RGB", "JPEG", 1),
    ((32, 32), "L", "PNG", 1),
    ((90, 33), "RGBA", "PNG", 1),
    ((41, 120), "CMYK", "JPEG", 1),
    ((21, 37), "P", "PNG", 1),
    ((60, 44), "RGB", "JPEG", 6),
    ((64, 64), "RGB", "WEBP", 3),
    ((33, 48), "LA", "PNG", 1),
    ((48, 36), "1", "PNG", 1),
    ((40, 40), "RGB", "BMP", 1),
    ((55, 31), "RGB", "PNG", 8),
]
PROCESSORS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("ViTImageProcessor", {"size": SQUARE, "resample": 1}),
    "vit-bytes": (
        "ViTImageProcessor",
        {"size": SQUARE, "do_rescale": False, "image_mean": [120.0] * 3, "image_std": [60.0] * 3},
    ),
    "deit": ("DeiTImageProcessor", {"size": {"height": 40, "width": 40}, "crop_size": SQUARE}),
    "dinov2": ("BitImageProcessor", {"size": {"shortest_edge": 37}, "crop_size": SQUARE}),
    "clip": ("CLIPImageProcessor", {"size": EDGE, "crop_size": SQUARE}),
    "siglip": ("SiglipImageProcessor", {"size": SQUARE}),
    "beit": ("BeitImageProcessor", {"size": {"height": 40, "width": 40}, "crop_size": SQUARE, "do_center_crop": True}),
    "convnext": ("ConvNextImageProcessor", {"size": EDGE, "crop_pct": 0.8}),
    "poolformer": ("PoolFormerImageProcessor", {"size": EDGE, "crop_size": SQUARE, "crop_pct": 0.9}),
    "efficientnet": ("EfficientNetImageProcessor", {"size": SQUARE}),
    "levit": ("LevitImageProcessor", {"size": EDGE, "crop_size": SQUARE}),
    "mobilevit": ("MobileViTImageProcessor", {"size": EDGE, "crop_size": SQUARE}),
    "perceiver": ("PerceiverImageProcessor", {"size": SQUARE, "crop_size": {"height": 37, "width": 37}}),
    "pp-lcnet": ("PPLCNetImageProcessor", {"resize_short": 36, "crop_size": 32}),
}
TIMM: dict[str, dict[str, Any]] = {
    "center": {"crop_mode": "center", "crop_pct": 0.8, "interpolation": "bicubic"},
    "squash": {"crop_mode": "squash", "crop_pct": 0.9, "interpolation": "lanczos"},
    "border": {"crop_mode": "border", "crop_pct": 1.0, "interpolation": "bilinear"},
}
Label = Callable[[Path], int]


def write_labelled(folder: Path, label: Label) -> None:
    """The images, each with its class in its name; at least some of them must have another class than the others."""
    folder.mkdir(parents=True)
    found = set()
    for row, (size, mode, kind, orientation) in enumerate(FILES):
        image = photo(*size, row)
        if mode in ("RGBA", "LA"):
            image = image.convert("L" if mode == "LA" else "RGB")
            image.putalpha(photo(*size, row + 100).convert("L"))
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = folder / f"{row:02}.{kind.lower().replace('jpeg', 'jpg')}"
        options = {} if kind == "BMP" else {"exif": exif}
        (image if mode in ("RGBA", "LA") else image.convert(mode)).save(path, kind, **options)
        found.add(label(path))
        path.rename(path.with_stem(f"{row:02}_{label(path)}"))
    assert len(found) > 1


def unpruned_accuracy(place: Path, images: Path, model: dict[str, Any], **more: Any) -> float:
    """What the command reports of the unpruned engine. place: of the run; one model's runs share their exports."""
    source = {"source": f"images:{images}"}
    raw = {
        "recipe": 1,
        "name": "fidelity",
        "model": {"task": "image-classification", **model},
        "data": {
            "calibration": source,
            "evaluation": {**source, "label_pattern": r"_(\d+)\.", "metric": "accuracy"},
        },
        "prune": {"budget": {"macs": 0.9}, "score": "magnitude", "compensate": False},
        "export": {"batch": [2]},
        **more,
    }
    (place / "recipe.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
    assert main([str(place / "recipe.yaml"), "--out", str(place / "run")]) == 0
    report = json.loads((place / "run" / "report.json").read_text(encoding="utf-8"))
    return float(report["accuracy"]["base"])


def centred(model: Any, head: torch.nn.Linear) -> Any:
    """The model with a head whose answers differ from image to image: random ones have a favourite."""
    images = [np.asarray(photo(*size, row).resize((32, 32)), np.float32) for row, (size, *_) in enumerate(FILES)]
    batch = torch.from_numpy((np.stack(images) / 127.5 - 1).transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
        output = model(batch)
        head.bias -= (output if isinstance(output, torch.Tensor) else output.logits).mean(0)
    return model


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a transformers model, to which each test adds a processor."""
    import transformers

    folder = tmp_path_factory.mktemp("vit")
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = transformers.ViTConfig(image_size=32, patch_size=8, num_labels=CLASSES, **small)
    model: Any = enlarge(transformers.ViTForImageClassification(config)).eval()
    centred(model, model.classifier).save_pretrained(folder / "model")
    return folder


@pytest.mark.usefixtures("short_measurement")
@pytest.mark.parametrize("name", PROCESSORS)
def test_transformers_labels(tmp_path: Path, vit: Path, name: str) -> None:
    """`load_image` opens the file and turns it, `AutoImageProcessor` prepares it."""
    pytest.importorskip("onnxruntime")
    import transformers
    from transformers.image_utils import load_image

    folder = processor_folder(vit / "model", *PROCESSORS[name])
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    model = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()

    def label(path: Path) -> int:
        with torch.no_grad():
            return int(model(**processor(load_image(str(path)), return_tensors="pt")).logits.argmax())

    write_labelled(tmp_path / "images", label)
    serves = name in ("dinov2", "mobilevit")
    ship = {"ship": {"triton": True, "ensemble": True}} if serves else {}
    assert unpruned_accuracy(vit, tmp_path / "images", {"source": str(folder)}, **ship) == 100.0
    if serves:
        served_answers_are_those_of(vit / "run", tmp_path / "images", model)


def served_answers_are_those_of(run: Path, images: Path, model: Any) -> None:
    """What the shipped model folder prepares, in the model."""
    place = run / "triton" / "fidelity-prepare" / "1"
    sys.modules.setdefault("triton_python_backend_utils", types.ModuleType("triton_python_backend_utils"))
    spec = importlib.util.spec_from_file_location("served_image_model", place / "model.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module._PIXELS.__file__ == str(place / "image_pixels.py")
    config = json.loads((place / "preprocess.json").read_text(encoding="utf-8"))
    for path in sorted(images.iterdir()):
        pixels = torch.from_numpy(module.prepare(path.read_bytes(), config))[None]
        with torch.no_grad():
            assert int(model(pixels).logits.argmax()) == int(path.stem.split("_")[1]), path.name


@pytest.fixture(scope="module")
def timm_place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("timm")


@pytest.mark.usefixtures("short_measurement")
@pytest.mark.parametrize("name", TIMM)
def test_timm_labels(tmp_path: Path, timm_place: Path, name: str) -> None:
    """A folder as timm writes it, with the configuration of its images; timm does not turn images by EXIF."""
    pytest.importorskip("onnxruntime")
    import timm
    from timm.data import create_transform, resolve_model_data_config
    from timm.models import save_for_hf

    args = {**VIT_ARGS, "in_chans": 3, "num_classes": CLASSES, "depth": 2}
    statistics = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.25), "input_size": (3, 32, 32), "num_classes": CLASSES}
    model: Any = enlarge(timm.create_model("vit_tiny_patch16_224", pretrained=False, **args)).eval()
    centred(model, model.head).pretrained_cfg = {**model.pretrained_cfg, **statistics, **TIMM[name]}
    save_for_hf(model, timm_place / "model", model_args=args)
    transform = create_transform(**resolve_model_data_config(model), is_training=False)

    def label(path: Path) -> int:
        with torch.no_grad():
            return int(model(transform(Image.open(path).convert("RGB"))[None]).argmax())

    write_labelled(tmp_path / "images", label)
    ship = {"ship": {"triton": True, "ensemble": True}}
    model_of = {"source": str(timm_place / "model")}
    assert unpruned_accuracy(timm_place, tmp_path / "images", model_of, **ship) == 100.0
    served_answers_are_those_of(timm_place / "run", tmp_path / "images", lambda batch: _Answer(model(batch)))


class _Answer:
    def __init__(self, logits: torch.Tensor) -> None:
        self.logits = logits
