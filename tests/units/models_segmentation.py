"""Small Swin, SegFormer and Mask2Former models, for classification and for semantic segmentation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.units.builders import IMAGES, Architecture, Models, Units, from_timm

MAPS = "image-segmentation"
#: Windows of 4 x 4 on 8 x 8 patches: plain, then shifted; then merged, and windows as large as what is left.
SWIN_TIMM = {
    "img_size": 32,
    "patch_size": 4,
    "in_chans": 1,
    "num_classes": 5,
    "embed_dim": 16,
    "depths": (2, 1),
    "num_heads": (2, 4),
    "window_size": 4,
    "mlp_ratio": 2.0,
}
SWIN: dict[str, Any] = {
    "image_size": 32,
    "patch_size": 4,
    "num_channels": 1,
    "embed_dim": 16,
    "depths": [2, 1],
    "num_heads": [2, 4],
    "window_size": 4,
    "mlp_ratio": 2.0,
}
SEGFORMER: dict[str, Any] = {
    "num_channels": 1,
    "num_encoder_blocks": 3,
    "depths": [1, 2, 1],
    "sr_ratios": [4, 2, 1],
    "hidden_sizes": [8, 16, 16],
    "patch_sizes": [7, 3, 3],
    "strides": [4, 2, 2],
    "num_attention_heads": [2, 4, 4],
    "mlp_ratios": [4, 2, 2],
    "decoder_hidden_size": 16,
}


def _from_transformers(name: str, **config: Any) -> Callable[[], Architecture]:
    def make() -> Architecture:
        import transformers

        settings = getattr(transformers, name).config_class(**config, num_labels=5, attn_implementation="eager")
        return {"library": "transformers", "class": name, "config": settings.to_dict()}

    return make


def _mask2former(**config: Any) -> Callable[[], Architecture]:
    def make() -> Architecture:
        import transformers

        # Windows of 3 x 3 on 16 x 16 patches: they are padded. Stages of 16, 8, 4 and 2 positions a side.
        small = {**SWIN, "patch_size": 2, "window_size": 3, "mlp_ratio": 4.0, "embed_dim": 8}
        backbone = transformers.SwinConfig(
            **{**small, "depths": [2, 1, 1, 1], "num_heads": [2, 2, 4, 4]},
            out_features=["stage1", "stage2", "stage3", "stage4"],
        )
        settings = {
            "backbone_config": backbone,
            "feature_size": 32,
            "mask_feature_size": 16,
            "hidden_dim": 32,
            "encoder_feedforward_dim": 128,
            "encoder_layers": 2,
            "decoder_layers": 3,
            "num_attention_heads": 4,
            "dim_feedforward": 32,
            "num_queries": 7,
            **config,
        }
        return _from_transformers("Mask2FormerForUniversalSegmentation", **settings)()

    return make


#: Families with a ReLU behind some units: one may happen to be zero on every image.
RECTIFIED = {"mask2former", "segformer"}
MODELS: Models = {
    "swin": ("swin", IMAGES, from_timm("swin_tiny_patch4_window7_224", **SWIN_TIMM)),
    "swin-padded": ("swin", IMAGES, from_timm("swin_tiny_patch4_window7_224", **{**SWIN_TIMM, "window_size": 3})),
    "swin-transformers": (
        "swin-transformers",
        IMAGES,
        _from_transformers("SwinForImageClassification", **SWIN),
    ),
    "segformer": ("segformer", MAPS, _from_transformers("SegformerForSemanticSegmentation", **SEGFORMER)),
    "segformer-classifier": ("segformer", IMAGES, _from_transformers("SegformerForImageClassification", **SEGFORMER)),
    "mask2former": ("mask2former", MAPS, _mask2former()),
}


def _units(*blocks: tuple[int, int, int]) -> dict[str, tuple[int, int]]:
    """(heads, head dim, neurons) per block."""
    units = {}
    for index, (heads, width, neurons) in enumerate(blocks):
        units |= {f"block{index:02d}.heads": (heads, width), f"block{index:02d}.neurons": (neurons, 1)}
    return units


_SWIN = _units((2, 8, 32), (2, 8, 32), (4, 8, 64))
_SEGFORMER = _units((2, 4, 32), (4, 4, 32), (4, 4, 32), (4, 4, 32))
_MASK2FORMER = {
    **_units((2, 4, 32), (2, 4, 32), (2, 8, 64), (4, 8, 128), (4, 16, 256), (4, 8, 128), (4, 8, 128)),
    "block07.neurons0": (32, 1),
    "block07.neurons1": (32, 1),
}
UNITS: Units = {
    "swin": _SWIN,
    "swin-padded": _SWIN,
    "swin-transformers": _SWIN,
    "segformer": {**_SEGFORMER, "block04.channels": (16, 1)},
    "segformer-classifier": _SEGFORMER,
    "mask2former": _MASK2FORMER,
}
