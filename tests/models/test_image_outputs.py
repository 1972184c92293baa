"""Embeddings, detections and depth of image models: exactly what the library gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import transformers

from optin_export.cli._guess import task_of
from optin_export.errors import InputError
from optin_export.models import LoadedModel, as_rows, build, class_axis
from optin_export.models.loading import load_model
from optin_export.recipe import ModelSection
from tests.conftest import enlarge

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
IMAGE = {**SMALL, "image_size": 32, "patch_size": 8}
CONV: dict[str, Any] = {"hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 1, 1]}
DINO = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "image_size": 56, "patch_size": 14}
#: Model class and configuration; what the library calls the embedding, and its layout.
EMBEDDINGS: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "dinov2": ("Dinov2Model", DINO, "pooler_output", "vector"),
    "dinov3": ("DINOv3ViTModel", IMAGE, "pooler_output", "vector"),
    "vit": ("ViTModel", IMAGE, "pooler_output", "vector"),
    "convnext": ("ConvNextModel", CONV, "pooler_output", "vector"),
    "resnet": ("ResNetModel", {**CONV, "embedding_size": 16}, "pooler_output", "vector"),
    "segformer": (
        "SegformerModel",
        {**CONV, "num_attention_heads": [1, 2, 2, 4], "decoder_hidden_size": 32},
        "last_hidden_state",
        "map",
    ),
}
PIXELS = torch.from_numpy(np.random.default_rng(0).standard_normal((2, 3, 56, 56), dtype=np.float32))


def saved(folder: Path, name: str, config: Any) -> Any:
    """The library's model as it is loaded again from this folder."""
    model_class = getattr(transformers, name)
    enlarge(model_class(config)).save_pretrained(folder)
    return model_class.from_pretrained(folder, attn_implementation="eager").eval()


def loaded(folder: Path, task: str) -> LoadedModel:
    return load_model(ModelSection(source=f"hf:{folder}", task=task))


def agrees(found: LoadedModel, pixels: torch.Tensor, wanted: torch.Tensor) -> None:
    """The module gives what the library gives, and its description rebuilds it."""
    with torch.no_grad():
        given = found.model(pixel_values=pixels)
    assert given.shape == wanted.shape
    torch.testing.assert_close(given, wanted, rtol=0, atol=5e-6 * float(wanted.abs().max()))
    rebuilt = build(found.architecture)
    rebuilt.load_state_dict(found.model.state_dict())
    with torch.no_grad():
        assert torch.equal(rebuilt(pixel_values=pixels), given)


@pytest.mark.parametrize("case", EMBEDDINGS)
def test_an_embedding_is_what_the_library_pools(tmp_path: Path, case: str) -> None:
    name, fields, output, layout = EMBEDDINGS[case]
    original = saved(tmp_path, name, getattr(transformers, name).config_class(**fields))
    size = fields.get("image_size", 56)
    pixels = PIXELS[..., :size, :size]
    with torch.no_grad():
        wanted = original(pixels)[output]
    found = loaded(tmp_path, "image-feature-extraction")
    agrees(found, pixels, wanted.flatten(1) if layout == "vector" else wanted)
    assert (found.model.output_layout, found.model.output_kind) == (layout, "embedding")
    assert task_of(str(tmp_path)) == "image-feature-extraction"


def test_a_pooler_without_weights_is_not_used(tmp_path: Path) -> None:
    config = transformers.ViTConfig(**IMAGE, num_labels=3)
    original = saved(tmp_path, "ViTForImageClassification", config)
    pixels = PIXELS[..., :32, :32]
    with torch.no_grad():
        wanted = original.vit(pixels).last_hidden_state
    found = loaded(tmp_path, "image-feature-extraction")
    agrees(found, pixels, wanted)
    assert found.model.output_layout == "tokens"
    assert not any("pooler" in name for name in found.model.state_dict())


def test_timm_models_lose_their_classes() -> None:
    args = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}
    section = ModelSection(
        source="timm:vit_tiny_patch16_224", task="image-feature-extraction", weights="random", args=args
    )
    found = load_model(section)
    original = timm.create_model("vit_tiny_patch16_224", num_classes=0, **args).eval()
    original.load_state_dict({name.removeprefix("model."): value for name, value in found.model.state_dict().items()})
    pixels = PIXELS[..., :32, :32]
    with torch.no_grad():
        agrees(found, pixels, original(pixels))


def detectors() -> dict[str, tuple[str, Any]]:
    yolos = transformers.YolosConfig(**{**IMAGE, "image_size": [56, 56]}, num_detection_tokens=7, num_labels=3)
    backbone = transformers.ResNetConfig(**CONV, embedding_size=16, out_features=["stage4"])
    small = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    sizes = {"encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "d_model": 32, "num_queries": 7, "num_labels": 3}
    detr = transformers.DetrConfig(
        backbone_config=backbone,
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        **small,
        **sizes,
    )
    return {"yolos": ("YolosForObjectDetection", yolos), "detr": ("DetrForObjectDetection", detr)}


@pytest.mark.parametrize("case", ["yolos", "detr"])
def test_detections_are_logits_and_boxes(tmp_path: Path, case: str) -> None:
    name, config = detectors()[case]
    original = saved(tmp_path, name, config)
    with torch.no_grad():
        output = original(PIXELS)
    found = loaded(tmp_path, "object-detection")
    agrees(found, PIXELS, torch.cat([output.logits, output.pred_boxes], -1))
    assert (found.model.output_name, found.model.output_layout) == ("detections", "tokens")
    assert class_axis(found.model) is None
    assert task_of(str(tmp_path)) == "object-detection"


def test_depth_is_one_number_per_pixel(tmp_path: Path) -> None:
    backbone = transformers.Dinov2Config(
        **DINO, out_features=["stage1", "stage2", "stage3", "stage4"], reshape_hidden_states=False
    )
    config = transformers.DepthAnythingConfig(
        backbone_config=backbone,
        patch_size=14,
        reassemble_hidden_size=32,
        neck_hidden_sizes=[16, 16, 16, 16],
        fusion_hidden_size=16,
    )
    original = saved(tmp_path, "DepthAnythingForDepthEstimation", config)
    with torch.no_grad():
        wanted = original(PIXELS).predicted_depth
    found = loaded(tmp_path, "depth-estimation")
    agrees(found, PIXELS, wanted[:, None])
    assert (found.model.output_kind, class_axis(found.model)) == ("regression", None)
    with torch.no_grad():
        rows = as_rows(found.model, found.model(PIXELS), {"pixel_values": PIXELS})
    assert rows.shape == (2, 56 * 56, 1)
    assert task_of(str(tmp_path)) == "depth-estimation"


def test_a_text_model_is_no_image_model(tmp_path: Path) -> None:
    transformers.BertModel(transformers.BertConfig(**SMALL, vocab_size=20)).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="BertModel cannot be used for image-feature-extraction"):
        loaded(tmp_path, "image-feature-extraction")
