"""Image files of every kind: how they are opened, which are refused, and what the library and the recipe say."""

from __future__ import annotations

import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import optin_export
from optin_export.data import Examples, Sources, images, load_sources, pixels
from optin_export.data.images import ImageProcessor
from optin_export.data.label_maps import LabelMaps
from optin_export.data.readers import IMAGE_SUFFIXES
from optin_export.errors import InputError
from optin_export.models.tasks import IGNORED
from optin_export.recipe import validate
from tests.conftest import ROOT
from tests.data.test_hub_images import photo, processor_folder

PLAIN = {"crop_pct": 1.0, "crop_mode": "squash", "interpolation": "bilinear"}
RAMP = np.tile(np.linspace(0, 1, 32), (32, 1))


def config(channels: int = 3, **more: Any) -> dict[str, Any]:
    return {"input_size": (channels, 32, 32), "mean": (0.0,) * channels, "std": (1.0,) * channels, **PLAIN, **more}


def saved(place: Path, image: Image.Image, **options: Any) -> Path:
    place.parent.mkdir(parents=True, exist_ok=True)
    image.save(place, **options)
    return place


def pixels_of(source: Any, channels: int = 3, **more: Any) -> np.ndarray:
    """By the processor, after a look at the file's head; the served arithmetic must agree."""
    processor = ImageProcessor(config(channels, **more))
    examples = Examples({"image": [source]})
    processor.check(examples)
    found = processor.encode(examples)["pixel_values"][0].numpy()
    if isinstance(source, Path):
        np.testing.assert_allclose(pixels.prepare(source.read_bytes(), processor.config), found, atol=1e-5)
    return found


# --- how a file is opened -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "RGBA", "LA", "CMYK", "PA", "transparent palette"])
def test_modes_are_converted_as_pillow_does(tmp_path: Path, mode: str, channels: int) -> None:
    image = photo(40, 50)
    options: dict[str, Any] = {}
    suffix = ".jpg" if mode == "CMYK" else ".png"
    if mode in ("RGBA", "LA", "PA"):
        image.putalpha(photo(40, 50, 1).convert("L"))
    if mode == "transparent palette":
        image, options = image.convert("P"), {"transparency": 3}
    elif mode not in ("RGBA", "PA"):
        image = image.convert(mode)
    path = saved(tmp_path / f"a{suffix}", image, **options)
    plain = Image.open(path).convert("L" if channels == 1 else "RGB")
    expected = np.asarray(plain.resize((32, 32), Image.Resampling.BILINEAR), np.float32).reshape(32, 32, channels) / 255
    np.testing.assert_allclose(pixels_of(path, channels), expected.transpose(2, 0, 1), atol=1e-6)


@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bits_are_scaled(tmp_path: Path, channels: int) -> None:
    """Pillow's own conversion would make all of it white."""
    path = saved(tmp_path / "a.png", Image.fromarray((RAMP * 65535).round().astype(np.uint16)))
    found = pixels_of(path, channels)
    assert np.abs(found - RAMP).max() <= 0.5 / 255 + 1e-6


@pytest.mark.parametrize(("mode", "dtype"), [("F", np.float32), ("I", np.int32)])
def test_pixels_without_a_known_range_are_refused(mode: str, dtype: type) -> None:
    image = Image.fromarray((RAMP * 1000).astype(dtype))
    assert image.mode == mode
    with pytest.raises(InputError, match="cannot read the image") as caught:
        pixels_of(image)
    assert "no known range" in caught.value.why


def test_four_channels_are_red_green_blue_and_alpha(tmp_path: Path) -> None:
    image = photo(32, 32)
    image.putalpha(photo(32, 32, 1).convert("L"))
    found = pixels_of(saved(tmp_path / "a.png", image), 4)
    np.testing.assert_allclose(found, np.asarray(image, np.float32).transpose(2, 0, 1) / 255, atol=1e-6)


@pytest.mark.parametrize(("channels", "says"), [(4, "has no alpha"), (2, "the model takes 2 channels"), (5, "takes 5")])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_files_without_the_models_channels_are_refused(tmp_path: Path, channels: int, says: str, mode: str) -> None:
    path = saved(tmp_path / "a.jpg", photo(40, 40).convert(mode))
    with pytest.raises(InputError, match="the images do not fit the model") as caught:
        pixels_of(path, channels)
    assert says in caught.value.why and str(path) in caught.value.why


@pytest.mark.parametrize("kind", ["jpg", "png", "webp"])
@pytest.mark.parametrize("orientation", [1, 3, 5, 6, 8])
def test_images_are_turned_where_the_library_turns_them(tmp_path: Path, kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path / f"a.{kind}", photo(40, 60), exif=exif, quality=100)
    from PIL import ImageOps

    for upright in (True, False):
        image = Image.open(path)
        image = (ImageOps.exif_transpose(image) if upright else image).convert("RGB")
        expected = np.asarray(image.resize((32, 32), Image.Resampling.BILINEAR), np.float32).transpose(2, 0, 1) / 255
        np.testing.assert_allclose(pixels_of(path, upright=upright), expected, atol=1e-6)


def test_long_narrow_images_are_refused_before_they_are_resized(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.png", Image.new("RGB", (30_000, 1)))
    assert pixels_of(path).shape == (3, 32, 32)  # stretched: nothing large on the way
    with pytest.raises(InputError, match="cannot read the image") as caught:
        pixels_of(path, crop_mode="center", crop_pct=0.5, input_size=(3, 224, 224))
    assert "too long and narrow" in caught.value.why


@pytest.mark.parametrize("package", ["optin_export", "tools"])
def test_nothing_opens_an_image_of_any_format(package: str) -> None:
    """Some formats that Pillow knows start programs."""
    for file in (ROOT / package).rglob("*.py"):
        for call in re.findall(r"Image\.open\((?:[^()]|\([^()]*\))*\)", file.read_text(encoding="utf-8")):
            assert "formats=" in call, f"{file}: {call}"


def test_a_folder_of_other_formats_says_so(tmp_path: Path, vit_recipe: Any) -> None:
    for suffix in ("gif", "tif"):
        saved(tmp_path / "images" / f"a.{suffix}", photo(20, 20))
    raw = vit_recipe(data={"calibration": {"source": f"images:{tmp_path / 'images'}"}})
    with pytest.raises(InputError, match="no images in") as caught:
        load_sources(validate(raw, tmp_path))
    assert "2 files (.gif, .tif)" in caught.value.why and ".webp" in caught.value.fix
    assert {suffix.strip(".") for suffix in IMAGE_SUFFIXES} == {"jpg", "jpeg", "png", "webp", "bmp"}


# --- arrays ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_arrays_of_the_models_size_are_only_normalised(channels: int) -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, channels), dtype=np.uint8)
    settings = config(channels, crop_pct=0.875, crop_mode="center")  # a file of this size would be cut
    found = ImageProcessor(settings).encode(Examples({"image": images}))["pixel_values"]
    assert torch.allclose(found, torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255)


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
def test_arrays_of_another_size_are_prepared_as_files_are(tmp_path: Path, mode: str) -> None:
    image = photo(40, 60)
    settings = {"crop_mode": mode, "crop_pct": 0.875}
    expected = pixels_of(saved(tmp_path / "a.png", image), **settings)
    processor = ImageProcessor(config(**settings))
    found = processor.encode(Examples({"image": np.asarray(image)[None]}))["pixel_values"][0].numpy()
    np.testing.assert_array_equal(found, expected)
    rows = processor.encode(Examples({"image": [np.asarray(image)]}))["pixel_values"][0].numpy()
    np.testing.assert_array_equal(rows, expected)


def test_arrays_of_two_channels_are_resized_each_by_itself() -> None:
    images = np.stack([np.asarray(photo(40, 60, seed).convert("L")) for seed in (0, 1)], -1)[None]
    found = ImageProcessor(config(2)).encode(Examples({"image": images}))["pixel_values"][0].numpy()
    for plane, band in zip(found, np.moveaxis(images[0], -1, 0), strict=True):
        expected = np.asarray(Image.fromarray(band).resize((32, 32), Image.Resampling.BILINEAR), np.float32) / 255
        np.testing.assert_allclose(plane, expected, atol=1e-6)


# --- models with and without a configuration of images ---------------------------------------------------------------


@pytest.fixture(scope="module")
def vit_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import transformers

    folder = tmp_path_factory.mktemp("plain-vit")
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 32}
    made = transformers.ViTConfig(image_size=32, patch_size=8, num_labels=4, **small)
    transformers.ViTForImageClassification(made).save_pretrained(folder)
    return folder


def loaded(tmp_path: Path, folder: Path, processor: str | None, **more: Any) -> Sources:
    """The model of `folder` with this preprocessor_config.json, on three images."""
    whole = tmp_path / "model"
    shutil.copytree(folder, whole, dirs_exist_ok=True)
    if processor is not None:
        (whole / "preprocessor_config.json").write_text(processor, encoding="utf-8")
    images = more.pop("images", tmp_path / "images")
    if not images.exists():
        for seed, size in enumerate([(40, 60), (60, 40), (32, 32)]):
            saved(images / f"{seed}.png", photo(*size, seed))
    raw: dict[str, Any] = {
        "recipe": 1,
        "name": "images",
        "model": {"source": str(whole), "task": "image-classification", "preprocess": more.pop("preprocess", {})},
        "data": {"calibration": {"source": f"images:{images}"}},
        "prune": {"budget": {"macs": 0.8}},
        **more,
    }
    return load_sources(validate(raw, tmp_path))


def processor_text(kind: str, **fields: Any) -> str:
    return json.dumps({"image_processor_type": kind, **fields})


def test_a_folder_without_a_processor_is_said(tmp_path: Path, vit_folder: Path) -> None:
    sources = loaded(tmp_path, vit_folder, None)
    assert isinstance(sources.processor, ImageProcessor)
    (note,) = sources.processor.notes
    assert "no preprocessor_config.json: images are stretched to 32 x 32 (bilinear), mean 0.5, std 0.5" in note


def test_nothing_is_said_where_the_recipe_says_all(tmp_path: Path, vit_folder: Path) -> None:
    everything = {"size": [32, 32], "mean": [0.5], "std": [0.5], "interpolation": "bilinear"}
    sources = loaded(tmp_path, vit_folder, None, preprocess=everything)
    assert isinstance(sources.processor, ImageProcessor) and sources.processor.notes == ()


def test_the_note_is_shown_and_kept_for_the_report(tmp_path: Path, vit_folder: Path) -> None:
    from optin_export.stages.checks import sources_load
    from optin_export.stages.context import RunContext

    sources = loaded(tmp_path, vit_folder, None)
    shown: list[str] = []
    work = RunContext(sources.recipe, tmp_path / "run", False, shown.append)
    sources_load(work)
    assert work.sources.recipe == sources.recipe
    assert len(shown) == 1 and shown == work.cache.warnings and "no preprocessor_config.json" in shown[0]


def test_a_damaged_processor_is_refused(tmp_path: Path, vit_folder: Path) -> None:
    with pytest.raises(InputError, match="cannot load the image processor"):
        loaded(tmp_path, vit_folder, '{"image_processor_type": ')


def test_the_processors_size_wins_over_the_models(tmp_path: Path, vit_folder: Path) -> None:
    """It says what the images become; the model's configuration what it was made for. Here they disagree."""
    with pytest.raises(InputError, match="does not run on the calibration data") as caught:
        loaded(tmp_path, vit_folder, processor_text("ViTImageProcessor", size={"height": 48, "width": 48}))
    assert "(1, 3, 48, 48)" in caught.value.what


EDGES = {"size": {"shortest_edge": 32, "longest_edge": 64}, "size_divisor": 8}


def test_images_that_become_different_sizes_are_refused_at_once(tmp_path: Path, vit_folder: Path) -> None:
    with pytest.raises(InputError, match="the images have different sizes after preprocessing") as caught:
        loaded(tmp_path, vit_folder, processor_text("Mask2FormerImageProcessor", **EDGES))
    assert "32 x 48" in caught.value.why and "48 x 32" in caught.value.why
    sources = loaded(
        tmp_path, vit_folder, processor_text("Mask2FormerImageProcessor", **EDGES), preprocess={"size": [32, 32]}
    )
    assert sources.fixed(3)["pixel_values"].shape == (3, 3, 32, 32)


def test_images_of_one_size_set_the_size(tmp_path: Path, vit_folder: Path) -> None:
    for seed in range(3):
        saved(tmp_path / "square" / f"{seed}.png", photo(50, 50, seed))
    processor = processor_text("Mask2FormerImageProcessor", **EDGES)
    sources = loaded(tmp_path, vit_folder, processor, images=tmp_path / "square")
    assert isinstance(sources.processor, ImageProcessor) and sources.processor.size == (32, 32)
    with pytest.raises(ValueError, match="the model takes"):
        pixels.prepare(encoded(photo(40, 60)), sources.processor.config)


def test_a_server_that_cannot_prepare_is_refused_at_the_start(tmp_path: Path, vit_folder: Path) -> None:
    """Owlv2 pads to a square and blurs: only transformers does that."""
    processor = processor_text("Owlv2ImageProcessor", size={"height": 32, "width": 32})
    sources = loaded(tmp_path, vit_folder, processor)
    assert sources.fixed(1)["pixel_values"].shape == (1, 3, 32, 32)
    with pytest.raises(InputError, match=r"ship\.ensemble cannot preprocess these images") as caught:
        loaded(tmp_path, vit_folder, processor, ship={"triton": True, "ensemble": True})
    assert "known to transformers only" in caught.value.why


def encoded(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def test_one_unreadable_evaluation_image_shows_before_any_work(tmp_path: Path, vit_folder: Path) -> None:
    for seed in range(3):
        saved(tmp_path / "judged" / f"{seed}.png", photo(50, 50, seed))
    saved(tmp_path / "judged" / "9.png", Image.new("RGB", (4, 4)), format="GIF")
    evaluation = {"source": f"images:{tmp_path / 'judged'}", "label_pattern": r"(\d)\.", "metric": "accuracy"}
    with pytest.raises(InputError, match=r"cannot read the image .*9\.png"):
        loaded(
            tmp_path,
            vit_folder,
            processor_text("ViTImageProcessor", size={"height": 32, "width": 32}),
            data={"calibration": {"source": f"images:{tmp_path / 'images'}"}, "evaluation": evaluation}
            if saved(tmp_path / "images" / "a.png", photo(40, 40))
            else {},
        )


# --- segmentation: a label map is of the whole image -----------------------------------------------------------------


@pytest.fixture(scope="module")
def segformer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import transformers

    from tests.units.models_segmentation import SEGFORMER

    folder = tmp_path_factory.mktemp("plain-segformer")
    made = transformers.SegformerConfig(**{**SEGFORMER, "num_channels": 3}, num_labels=4)
    transformers.SegformerForSemanticSegmentation(made).save_pretrained(folder)
    return folder


def scenes(tmp_path: Path, segformer: Path, processor: str, exif: int = 1, **more: Any) -> Sources:
    tag = Image.Exif()
    tag[0x0112] = exif
    for seed in range(2):
        saved(tmp_path / "images" / f"{seed}.png", photo(40, 60, seed), exif=tag)
        classes = np.random.default_rng(seed).integers(0, 5, (40, 60), dtype=np.uint8)
        saved(tmp_path / "maps" / f"{seed}.png", Image.fromarray(classes))
    folder = tmp_path / "model"
    shutil.copytree(segformer, folder, dirs_exist_ok=True)
    (folder / "preprocessor_config.json").write_text(processor, encoding="utf-8")
    source = {"source": f"images:{tmp_path / 'images'}"}
    evaluation = {**source, "label_folder": str(tmp_path / "maps"), "metric": "mean_iou", "ignore": 4}
    raw = {
        "recipe": 1,
        "name": "scenes",
        "model": {"source": str(folder), "task": "image-segmentation", "preprocess": more.pop("preprocess", {})},
        "data": {"calibration": source, "evaluation": evaluation | more.pop("evaluation", {})},
        "prune": {"budget": {"macs": 0.8}},
    }
    return load_sources(validate(raw, tmp_path))


CUTS = processor_text("MobileViTImageProcessor", size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32})
SQUASHES = processor_text("SegformerImageProcessor", size={"height": 32, "width": 32})


def test_a_crop_does_not_go_with_label_maps(tmp_path: Path, segformer: Path) -> None:
    with pytest.raises(InputError, match="the label maps do not fit the model's input") as caught:
        scenes(tmp_path, segformer, CUTS)
    assert "crops or pads" in caught.value.why
    sources = scenes(tmp_path, segformer, CUTS, preprocess={"size": [32, 32]})
    found = sources.fixed(1)["pixel_values"][0].numpy()
    whole = photo(40, 60).resize((32, 32), Image.Resampling.BICUBIC)
    expected = np.asarray(whole, np.float32)[..., ::-1].transpose(2, 0, 1) / 255  # this processor puts blue first
    assert np.abs(found - expected).max() <= 2.01 / 255


def test_a_turned_image_does_not_go_with_its_label_map(tmp_path: Path, segformer: Path) -> None:
    scenes(tmp_path, segformer, SQUASHES)
    with pytest.raises(InputError, match="cannot read the image") as caught:
        scenes(tmp_path, segformer, SQUASHES, exif=6)
    assert "EXIF" in caught.value.why


def test_labels_are_reduced_where_the_processor_reduces_them(tmp_path: Path, segformer: Path) -> None:
    import transformers

    text = processor_text("SegformerImageProcessor", size={"height": 40, "width": 60}, do_reduce_labels=True)
    sources = scenes(tmp_path, segformer, text, preprocess={"size": [32, 32]}, evaluation={"ignore": 255})
    assert sources.evaluation_examples is not None
    maps = sources.labels(sources.evaluation_examples)
    assert isinstance(maps, LabelMaps)
    stored = Image.open(tmp_path / "maps" / "0.png")
    own = transformers.AutoImageProcessor.from_pretrained(processor_folder_of(tmp_path, text))
    expected = own(photo(40, 60), segmentation_maps=stored, return_tensors="pt")["labels"][0].numpy()
    assert np.array_equal(maps[0], np.where(expected == 255, IGNORED, expected))


def processor_folder_of(tmp_path: Path, text: str) -> Path:
    fields = json.loads(text)
    return processor_folder(tmp_path / "library", fields.pop("image_processor_type"), fields)


# --- timm -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "convnext_atto", "mobilenetv3_small_050"])
@pytest.mark.parametrize("changes", [{}, {"crop_mode": "border"}, {"crop_mode": "squash", "interpolation": "lanczos"}])
def test_timm_models_get_timms_own_transform(name: str, changes: dict[str, Any]) -> None:
    import timm
    from timm.data import create_transform, resolve_model_data_config

    model = timm.create_model(name, pretrained=False, num_classes=4)
    model.pretrained_cfg = {**model.pretrained_cfg, **changes}
    settings = resolve_model_data_config(model) | {"input_size": (3, 64, 64)}
    transform = create_transform(**settings, is_training=False)
    processor = ImageProcessor({**settings, "upright": False})
    for seed, size in enumerate([(70, 100), (100, 70), (30, 31), (64, 64), (20, 190)]):
        image = photo(*size, seed)
        expected = transform(image)
        assert torch.equal(processor.encode(Examples({"image": [image]}))["pixel_values"][0], expected)
        answer = pixels.prepare(encoded(image), json.loads(json.dumps(processor.config)))
        np.testing.assert_allclose(answer, expected.numpy(), atol=1e-5)


def test_a_random_filter_is_refused(tmp_path: Path, vit_recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import timm.data

    own = timm.data.resolve_model_data_config
    monkeypatch.setattr(timm.data, "resolve_model_data_config", lambda model: own(model) | {"interpolation": "random"})
    with pytest.raises(InputError, match="random filter"):
        load_sources(validate(vit_recipe(), tmp_path))


def test_the_package_names_its_formats_once() -> None:
    assert pixels.FORMATS == ("JPEG", "PNG", "WEBP", "BMP")
    assert optin_export.data.readers.IMAGE_FORMATS is pixels.FORMATS


def test_a_timm_model_inside_transformers(tmp_path: Path) -> None:
    """Its images are configured as timm's, and opened as those of transformers."""
    import timm
    import transformers
    from transformers.image_utils import load_image

    args = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 4}
    plain = timm.create_model("vit_tiny_patch16_224", pretrained=False, **args).pretrained_cfg
    settings = {**plain, "input_size": [3, 32, 32], "crop_mode": "border", "crop_pct": 0.9, "mean": [0.4, 0.5, 0.6]}
    settings.pop("num_classes")
    made = transformers.TimmWrapperConfig(
        architecture="vit_tiny_patch16_224", model_args=args, num_labels=4, pretrained_cfg=settings
    )
    transformers.TimmWrapperForImageClassification(made).save_pretrained(tmp_path / "wrapped")
    exif = Image.Exif()
    exif[0x0112] = 6
    path = saved(tmp_path / "images" / "a.png", photo(40, 60), exif=exif)
    found = loaded(tmp_path, tmp_path / "wrapped", None).fixed(1)["pixel_values"]
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "wrapped")
    assert torch.equal(found, processor(load_image(str(path)), return_tensors="pt")["pixel_values"])


class Rearranged(torch.nn.Module):
    """Squares of 4 x 4 pixels become channels before the first convolution, as in TResNet."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels, self.conv = channels, torch.nn.Conv2d(16 * channels, 8, 1)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.conv(torch.nn.functional.pixel_unshuffle(pixel_values, 4)).mean((2, 3))


@pytest.mark.parametrize("channels", [1, 3])
def test_channels_are_those_of_the_image_and_not_of_the_first_convolution(channels: int) -> None:
    assert images._channels(Rearranged(channels), (16, 16)) == channels


def test_many_channels_that_the_first_convolution_reads_stay() -> None:
    assert images._channels(torch.nn.Sequential(torch.nn.Conv2d(12, 8, 3)), (16, 16)) == 12
