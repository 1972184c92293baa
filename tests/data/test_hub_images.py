"""Image processors of transformers: the pixels are the library's own, and a server makes the same."""

from __future__ import annotations

import importlib
import io
import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from optin_export.data import Examples, pixels
from optin_export.data.hub_images import MEAN_LEVELS, MOST_LEVELS, load_hub_images
from optin_export.data.images import ImageProcessor
from optin_export.errors import InputError
from optin_export.recipe import ModelSection

SQUARE = {"height": 32, "width": 32}
EDGE = {"shortest_edge": 32}
#: The class of a processor, and fields of its file.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("ViTImageProcessor", {"size": SQUARE}),
    "vit, one number": ("ViTImageProcessor", {"size": 32}),
    "vit, not square": ("ViTImageProcessor", {"size": {"height": 32, "width": 48}}),
    "vit, not normalised": ("ViTImageProcessor", {"size": SQUARE, "do_normalize": False}),
    "vit, not rescaled": ("ViTImageProcessor", {"size": SQUARE, "do_rescale": False, "do_normalize": False}),
    "vit, another factor": ("ViTImageProcessor", {"size": SQUARE, "rescale_factor": 1 / 127.5}),
    "vit, normalised bytes": (
        "ViTImageProcessor",
        {"size": SQUARE, "do_rescale": False, "image_mean": [120.0] * 3, "image_std": [60.0, 61.0, 62.0]},
    ),
    "vit, nearest": ("ViTImageProcessor", {"size": SQUARE, "resample": 0}),
    "vit, lanczos": ("ViTImageProcessor", {"size": SQUARE, "resample": 1}),
    "vit, box": ("ViTImageProcessor", {"size": SQUARE, "resample": 4}),
    "vit, hamming": ("ViTImageProcessor", {"size": SQUARE, "resample": 5}),
    "deit": ("DeiTImageProcessor", {"size": {"height": 40, "width": 40}, "crop_size": SQUARE}),
    "dinov2": ("BitImageProcessor", {"size": {"shortest_edge": 37}, "crop_size": SQUARE}),
    "bit, crop larger than the image": ("BitImageProcessor", {"size": {"shortest_edge": 20}, "crop_size": SQUARE}),
    "clip": ("CLIPImageProcessor", {"size": EDGE, "crop_size": {"height": 32, "width": 32}}),
    "clip, plain numbers": ("CLIPImageProcessor", {"size": 32, "crop_size": 32}),
    "siglip": ("SiglipImageProcessor", {"size": SQUARE}),
    "beit": ("BeitImageProcessor", {"size": {"height": 40, "width": 40}, "crop_size": SQUARE, "do_center_crop": True}),
    "convnext below 384": ("ConvNextImageProcessor", {"size": EDGE, "crop_pct": 0.875}),
    "convnext from 384 on": ("ConvNextImageProcessor", {"size": {"shortest_edge": 384}, "crop_pct": 0.875}),
    "poolformer": ("PoolFormerImageProcessor", {"size": EDGE, "crop_size": SQUARE, "crop_pct": 0.9}),
    "poolformer, both sides": ("PoolFormerImageProcessor", {"size": SQUARE, "crop_size": SQUARE, "crop_pct": 0.9}),
    "efficientnet": ("EfficientNetImageProcessor", {"size": SQUARE}),
    "efficientnet, offset": (
        "EfficientNetImageProcessor",
        {"size": SQUARE, "rescale_factor": 1 / 127.5, "rescale_offset": True, "include_top": False},
    ),
    "levit": ("LevitImageProcessor", {"size": EDGE, "crop_size": SQUARE}),
    "mobilevit": ("MobileViTImageProcessor", {"size": EDGE, "crop_size": SQUARE}),
    "mobilevit, red first": (
        "MobileViTImageProcessor",
        {"size": EDGE, "crop_size": SQUARE, "do_flip_channel_order": False},
    ),
    "mobilenet v1": ("MobileNetV1ImageProcessor", {"size": {"shortest_edge": 37}, "crop_size": SQUARE}),
    "mobilenet v2": ("MobileNetV2ImageProcessor", {"size": {"shortest_edge": 37}, "crop_size": SQUARE}),
    "perceiver": ("PerceiverImageProcessor", {"size": SQUARE, "crop_size": {"height": 37, "width": 37}}),
    "pvt": ("PvtImageProcessor", {"size": SQUARE}),
    "segformer": ("SegformerImageProcessor", {"size": SQUARE}),
    "dpt": ("DPTImageProcessor", {"size": SQUARE}),
    "dpt, multiples": ("DPTImageProcessor", {"size": {"height": 30, "width": 30}, "ensure_multiple_of": 8}),
    "mask2former, both sides": ("Mask2FormerImageProcessor", {"size": SQUARE}),
    "dinov3": ("DINOv3ViTImageProcessor", {"size": SQUARE}),
    "pp-lcnet": ("PPLCNetImageProcessor", {"resize_short": 36, "crop_size": 32}),
    "padded": ("PI0ImageProcessor", {"size": {"max_height": 32, "max_width": 32}, "pad_size": SQUARE}),
}
#: Their sizes depend on the image.
VARIABLE: dict[str, tuple[str, dict[str, Any]]] = {
    "mask2former": ("Mask2FormerImageProcessor", {"size": {"shortest_edge": 32, "longest_edge": 48}}),
    "maskformer": ("MaskFormerImageProcessor", {"size": {"shortest_edge": 32, "longest_edge": 48}}),
    "oneformer": ("OneFormerImageProcessor", {"size": {"shortest_edge": 32, "longest_edge": 48}}),
    "dpt, ratio kept": (
        "DPTImageProcessor",
        {"size": SQUARE, "keep_aspect_ratio": True, "ensure_multiple_of": 8},
    ),
    "textnet": ("TextNetImageProcessor", {"size": EDGE}),
}


def section(source: str, **preprocess: Any) -> ModelSection:
    return ModelSection.model_validate({"source": source, "task": "image-classification", "preprocess": preprocess})


def processor_folder(folder: Path, kind: str, fields: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"image_processor_type": kind, **fields})
    (folder / "preprocessor_config.json").write_text(text, encoding="utf-8")
    return folder


def photo(height: int, width: int, seed: int = 0) -> Image.Image:
    """Patches of colour with noise: neither flat nor all noise, as photographs are."""
    rng = np.random.default_rng(seed)
    patches = np.kron(rng.integers(0, 256, (7, 9, 3)), np.ones((height // 7 + 1, width // 9 + 1, 1)))[:height, :width]
    return Image.fromarray(np.clip(patches + rng.normal(0, 12, patches.shape), 0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", types.ModuleType("triton_python_backend_utils"))
    return importlib.import_module("optin_export.ship.served.image_model")


def library(folder: Path, image: Image.Image) -> np.ndarray:
    """What transformers makes of an image, by its defaults; by its Pillow backend what only that can do."""
    import transformers

    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    if processor.resample in (4, 5):  # box and hamming
        processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    made = processor(image, return_tensors="pt")
    return np.asarray(made["pixel_values"][0], dtype=np.float32)


@pytest.mark.parametrize("name", [*KINDS, *VARIABLE])
def test_pixels_are_the_processors_own(tmp_path: Path, served: Any, name: str) -> None:
    kind, fields = {**KINDS, **VARIABLE}[name]
    folder = processor_folder(tmp_path, kind, fields)
    hub = load_hub_images(str(folder), section(str(folder)), 3, segments=False)
    assert hub is not None and "refused" not in hub.config
    level = np.abs(hub.config["scale"] / np.float32(hub.config["std"])).reshape(-1, 1, 1)
    for seed, size in enumerate([(50, 70), (70, 50), (32, 32), (21, 37), (150, 61), (33, 200)]):
        image = photo(*size, seed)
        expected = library(folder, image)
        processor = ImageProcessor(hub.config, hub.pixels)
        found = processor.encode(Examples({"image": [image]}))["pixel_values"][0].numpy()
        assert np.array_equal(found, expected), f"{size}: not the library's"
        config = json.loads(json.dumps(processor.config))  # as a run writes it
        answer = served.prepare(encoded(image), config)
        levels = np.abs(answer - expected) / level
        assert answer.shape == expected.shape and answer.dtype == np.float32
        assert levels.max() <= MOST_LEVELS and levels.mean() <= MEAN_LEVELS, f"{size}: {levels.max()}"
        assert pixels.check_header(pixels.header(image), config) == expected.shape[1:]


def test_a_filter_that_only_pillow_has_is_said(tmp_path: Path) -> None:
    folder = processor_folder(tmp_path, "ViTImageProcessor", {"size": SQUARE, "resample": 4})
    hub = load_hub_images(str(folder), section(str(folder)), 3, segments=False)
    assert hub is not None and "its Pillow backend" in hub.notes[0]


def test_steps_that_do_not_make_the_same_pixels_are_not_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor that does something of its own is used, and a server is told that it cannot."""
    import transformers

    own = transformers.ViTImageProcessor.resize
    monkeypatch.setattr(
        transformers.ViTImageProcessor,
        "resize",
        lambda self, image, *rest, **more: own(self, image, *rest, **more).flip(-1),
    )
    folder = processor_folder(tmp_path, "ViTImageProcessor", {"size": SQUARE})
    hub = load_hub_images(str(folder), section(str(folder)), 3, segments=False)
    assert hub is not None and "known to transformers only" in hub.config["refused"]
    image = photo(50, 70)
    found = ImageProcessor(hub.config, hub.pixels).encode(Examples({"image": [image]}))["pixel_values"][0].numpy()
    assert np.array_equal(found, library(folder, image))


@pytest.mark.parametrize(
    ("kind", "fields", "preprocess", "same"),
    [
        ("ViTImageProcessor", {"size": SQUARE}, {"size": [24, 40]}, {"size": {"height": 24, "width": 40}}),
        (
            "BitImageProcessor",
            {"size": {"shortest_edge": 40}, "crop_size": SQUARE},
            {"size": [16, 16]},
            {"size": {"shortest_edge": 20}, "crop_size": {"height": 16, "width": 16}},
        ),
        ("ConvNextImageProcessor", {"size": EDGE}, {"size": [48, 48]}, {"size": {"shortest_edge": 48}}),
        (
            "Mask2FormerImageProcessor",
            {"size": {"shortest_edge": 32, "longest_edge": 48}},
            {"size": [24, 40]},
            {"size": {"height": 24, "width": 40}, "size_divisor": 1},
        ),
        ("ViTImageProcessor", {"size": SQUARE}, {"mean": [0.1, 0.2, 0.3]}, {"image_mean": [0.1, 0.2, 0.3]}),
        ("ViTImageProcessor", {"size": SQUARE}, {"std": [0.25]}, {"image_std": [0.25, 0.25, 0.25]}),
        ("ViTImageProcessor", {"size": SQUARE}, {"interpolation": "bicubic"}, {"resample": 3}),
        (
            "PerceiverImageProcessor",
            {"size": {"height": 28, "width": 28}, "crop_size": SQUARE},
            {"size": [56, 56]},
            {"size": {"height": 56, "width": 56}, "crop_size": {"height": 64, "width": 64}},
        ),
    ],
)
def test_the_recipe_overrides_field_by_field(
    tmp_path: Path, kind: str, fields: dict[str, Any], preprocess: dict[str, Any], same: dict[str, Any]
) -> None:
    folder = processor_folder(tmp_path / "own", kind, fields)
    hub = load_hub_images(str(folder), section(str(folder), **preprocess), 3, segments=False)
    assert hub is not None and "refused" not in hub.config
    image = photo(50, 70)
    expected = library(processor_folder(tmp_path / "other", kind, {**fields, **same}), image)
    assert np.array_equal(hub.pixels(image).numpy(), expected)


@pytest.mark.parametrize(
    ("kind", "fields", "preprocess", "says"),
    [
        ("MobileViTImageProcessor", {"size": EDGE, "crop_size": SQUARE}, {"mean": [0.5]}, "mean cannot be applied"),
        ("ViTImageProcessor", {"size": SQUARE, "do_rescale": False}, {"mean": [0.5]}, "mean and std do not fit"),
        ("ViTImageProcessor", {"size": SQUARE}, {"mean": [0.5, 0.5]}, "mean has 2 values"),
        ("ConvNextImageProcessor", {"size": EDGE}, {"size": [32, 48]}, "cannot"),
        ("GLPNImageProcessor", {"size_divisor": 8}, {"size": [32, 48]}, "cannot be applied"),
        ("ViTImageProcessor", {"do_resize": False}, {"interpolation": "nearest"}, "interpolation cannot be applied"),
    ],
)
def test_what_a_processor_does_not_do_is_refused(
    tmp_path: Path, kind: str, fields: dict[str, Any], preprocess: dict[str, Any], says: str
) -> None:
    folder = processor_folder(tmp_path, kind, fields)
    with pytest.raises(InputError) as caught:
        load_hub_images(str(folder), section(str(folder), **preprocess), 3, segments=False)
    assert says in caught.value.what


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "cannot load the image processor"),
        ('{"image_processor_type": "NoSuchProcessor"}', "cannot load the image processor"),
        ('{"image_processor_type": "ViTImageProcessor", "size": {"side": 3}}', "cannot load the image processor"),
        ('{"image_processor_type": "Siglip2ImageProcessor"}', "the images of Siglip2ImageProcessor cannot be used"),
        (
            '{"image_processor_type": "ImageGPTImageProcessor", "clusters": [[0, 0, 0], [1, 1, 1]]}',
            "the images of ImageGPTImageProcessor cannot be used",
        ),
        ('{"image_processor_type": "ImageGPTImageProcessor"}', "ImageGPTImageProcessor cannot preprocess an image"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "preprocessor_config.json").write_text(text, encoding="utf-8")
    with pytest.raises(InputError) as caught:
        load_hub_images(str(tmp_path), section(str(tmp_path)), 3, segments=False)
    assert says in caught.value.what


def test_a_folder_without_a_file_has_no_processor(tmp_path: Path) -> None:
    (tmp_path / "processor_config.json").write_text('{"processor_class": "CLIPProcessor"}', encoding="utf-8")
    assert load_hub_images(str(tmp_path), section(str(tmp_path)), 3, segments=False) is None


@pytest.mark.parametrize("channels", [1, 4])
def test_models_of_other_channels(tmp_path: Path, served: Any, channels: int) -> None:
    statistics = {"image_mean": [0.5] * channels, "image_std": [0.25] * channels}
    folder = processor_folder(tmp_path, "BitImageProcessor", {"size": EDGE, "crop_size": SQUARE, **statistics})
    hub = load_hub_images(str(folder), section(str(folder)), channels, segments=False)
    assert hub is not None and hub.config["input_size"] == [channels, 32, 32]
    image = photo(50, 70)
    if channels == 4:
        image.putalpha(photo(50, 70, 1).convert("L"))
    found = ImageProcessor(hub.config, hub.pixels).encode(Examples({"image": [image]}))["pixel_values"][0].numpy()
    answer = served.prepare(encoded(image), hub.config)
    assert found.shape == answer.shape == (channels, 32, 32)
    assert np.abs(found - answer).max() <= MOST_LEVELS / 255 / 0.25
