"""Image encoders and convolutional networks beside the plain ones of `models`: small, with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.conftest import VIT_ARGS
from tests.units.builders import IMAGE, IMAGES, RESNET, Models, Units, from_python, from_timm, from_transformers

CONVNETS = Path(__file__).parent / "convnets.py"
CONVOLUTIONAL = {"mobilenet", "regnet", "convnext"}
SMALL: dict[str, Any] = {"in_chans": 1, "num_classes": 5}
#: Three heads of 7 features: no size is a multiple of 8.
ODD: dict[str, Any] = {**VIT_ARGS, "embed_dim": 21, "num_heads": 3}
EVA: dict[str, Any] = {**VIT_ARGS, "init_values": 0.5}
#: timm's EfficientNet builder: no expansion; expansion and squeeze-and-excitation, residual; stride; fused expansion.
STAGES = [["ds_r1_k3_s1_e1_c8"], ["ir_r2_k3_s2_e3_c16_se0.25"], ["er_r2_k3_s1_e2_c16"]]


def _efficientnet(stages: list[list[str]]) -> Any:
    return from_python(CONVNETS, "efficientnet_of", stages=stages)


def _vision(name: str, **config: Any) -> Any:
    return from_transformers(name, **{**IMAGE, **config}, num_labels=5)


MODELS: Models = {
    # DINOv2
    "dinov2": ("vit", IMAGES, from_timm("vit_small_patch14_dinov2", **{**VIT_ARGS, "init_values": 0.5})),
    "dinov2-registers": (
        "vit",
        IMAGES,
        from_timm("vit_small_patch14_reg4_dinov2", **{**VIT_ARGS, "init_values": 0.5, "reg_tokens": 2}),
    ),
    "dinov2-swiglu": (
        "vit",
        IMAGES,
        from_timm("vit_giant_patch14_dinov2", **{**VIT_ARGS, "init_values": 0.5, "mlp_ratio": 3.0}),
    ),
    "dinov2-transformers": ("vit-transformers", IMAGES, _vision("Dinov2ForImageClassification", layerscale_value=0.5)),
    "dinov2-transformers-swiglu": (
        "vit-transformers",
        IMAGES,
        _vision("Dinov2ForImageClassification", layerscale_value=0.5, use_swiglu_ffn=True),
    ),
    "dinov2-transformers-registers": (
        "vit-transformers",
        IMAGES,
        _vision("Dinov2WithRegistersForImageClassification", layerscale_value=0.5, num_register_tokens=2),
    ),
    "vit-odd-heads": ("vit", IMAGES, from_timm("vit_tiny_patch16_224", **ODD)),
    "vit-transformers-odd-heads": (
        "vit-transformers",
        IMAGES,
        _vision("ViTForImageClassification", hidden_size=21, num_attention_heads=3),
    ),
    # BEiT: relative position tables per block, biases beside the fused projection, layer scale on the block
    "beit": ("vit", IMAGES, from_timm("beit_base_patch16_224", **{**VIT_ARGS, "init_values": 0.5})),
    "beit-odd-heads": ("vit", IMAGES, from_timm("beit_base_patch16_224", **{**ODD, "init_values": None})),
    "beit-no-bias": ("vit", IMAGES, from_timm("beitv2_base_patch16_224", **{**EVA, "qkv_bias": False})),
    "beit-transformers": (
        "vit-transformers",
        IMAGES,
        _vision("BeitForImageClassification", layer_scale_init_value=0.5, use_relative_position_bias=True),
    ),
    "beit-transformers-plain": (
        "vit-transformers",
        IMAGES,
        _vision("BeitForImageClassification", layer_scale_init_value=0.0, use_relative_position_bias=False),
    ),
    # EVA: rotary embedding, gated MLPs, projections in one or in three
    "eva": ("vit", IMAGES, from_timm("eva_giant_patch14_224", **EVA)),
    "eva02": ("vit", IMAGES, from_timm("eva02_tiny_patch14_224", **EVA)),
    "eva02-unfused": (
        "vit",
        IMAGES,
        from_timm("eva02_base_patch14_448", **{**EVA, "scale_mlp": False, "qkv_fused": False, "swiglu_align_to": 8}),
    ),
    "dinov3": ("vit", IMAGES, from_timm("vit_small_patch16_dinov3", **{**EVA, "num_classes": 5})),
    "eva-grouped-query": (
        "vit",
        IMAGES,
        from_timm("vit_small_patch16_rope_224", **{**EVA, "num_heads": 8, "num_kv_heads": 4, "qkv_fused": False}),
    ),
    # ConvNeXt
    "convnext": (
        "convnext",
        IMAGES,
        from_timm(
            "convnext_atto",
            **SMALL,
            depths=[1, 1, 2, 1],
            dims=[8, 16, 24, 24],
            patch_size=2,
            conv_mlp=False,
            ls_init_value=0.5,
        ),
    ),
    "convnext-conv-mlp": (
        "convnext",
        IMAGES,
        from_timm(
            "convnext_atto",
            **SMALL,
            depths=[1, 1, 2, 1],
            dims=[8, 16, 24, 24],
            patch_size=2,
            conv_mlp=True,
            ls_init_value=None,
        ),
    ),
    "convnext-transformers": (
        "convnext",
        IMAGES,
        from_transformers(
            "ConvNextForImageClassification",
            num_channels=1,
            patch_size=2,
            num_stages=3,
            hidden_sizes=[8, 16, 24],
            depths=[1, 1, 2],
            layer_scale_init_value=0.5,
            image_size=32,
            num_labels=5,
        ),
    ),
    "convnext-torchvision": ("convnext", IMAGES, from_python(CONVNETS, "convnext")),
    # inverted residuals
    "mobilenet-timm": ("mobilenet", IMAGES, _efficientnet(STAGES)),
    "mobilenetv4-timm": (
        "mobilenet",
        IMAGES,
        _efficientnet([["uir_r1_a3_k5_s2_e2_c16"], ["uir_r2_a0_k3_s1_e2_c16"], ["uir_r1_a3_k0_s1_e2_c16"]]),
    ),
    "mobilenet-grouped": ("mobilenet", IMAGES, _efficientnet([["ir_r2_k3_s2_e3_c16_gs6_se0.25"]])),
    "mobilenetv2-torchvision": ("mobilenet", IMAGES, from_python(CONVNETS, "mobilenet_v2")),
    "mobilenetv3-torchvision": ("mobilenet", IMAGES, from_python(CONVNETS, "mobilenet_v3")),
    "efficientnet-torchvision": ("mobilenet", IMAGES, from_python(CONVNETS, "efficientnet")),
    # groups of grouped convolutions
    "regnetx-timm": ("regnet", IMAGES, from_python(CONVNETS, "regnet_of", se_ratio=0.0)),
    "regnety-timm": ("regnet", IMAGES, from_python(CONVNETS, "regnet_of", se_ratio=0.25)),
    "regnety-torchvision": ("regnet", IMAGES, from_python(CONVNETS, "regnet")),
    "resnext-timm": ("resnet", IMAGES, from_timm("resnext50_32x4d", **{**RESNET, "cardinality": 4, "base_width": 32})),
    "resnext-torchvision": ("resnet", IMAGES, from_python(CONVNETS, "resnext")),
    "seresnet-timm": ("resnet", IMAGES, from_timm("seresnet18", **RESNET)),
    "seresnext-timm": (
        "resnet",
        IMAGES,
        from_timm("seresnext50_32x4d", **{**RESNET, "cardinality": 4, "base_width": 32}),
    ),
}


def _encoder(heads: int, width: int, neurons: int) -> dict[str, tuple[int, int]]:
    """Three blocks of heads and neurons."""
    return {
        f"block{block:02d}.{kind}": pair
        for block in range(3)
        for kind, pair in (("heads", (heads, width)), ("neurons", (neurons, 1)))
    }


def _convolutions(kind: str, *units: tuple[int, int], first: int = 0) -> dict[str, tuple[int, int]]:
    return {f"block{block:02d}.{kind}": pair for block, pair in enumerate(units, start=first)}


_REGNET = _convolutions("channels", (2, 4), (4, 4), (6, 4), (6, 4), (10, 4))
_RESNEXT = _convolutions("channels", (4, 4), (4, 4), (4, 8), (4, 12), (4, 16))
_CONVNEXT = _convolutions("neurons", (32, 1), (64, 1), (96, 1), (96, 1), (96, 1))
UNITS: Units = {
    **dict.fromkeys(("dinov2", "dinov2-registers", "dinov2-transformers", "beit", "beit-no-bias"), _encoder(4, 8, 128)),
    **dict.fromkeys(("dinov2-transformers-registers", "dinov3", "eva-grouped-query"), _encoder(4, 8, 128)),
    **dict.fromkeys(("beit-transformers", "beit-transformers-plain"), _encoder(4, 8, 64)),
    **dict.fromkeys(("vit-odd-heads", "beit-odd-heads"), _encoder(3, 7, 84)),
    **dict.fromkeys(("dinov2-transformers-swiglu", "eva02-unfused"), _encoder(4, 8, 88)),
    "vit-transformers-odd-heads": _encoder(3, 7, 64),
    "dinov2-swiglu": _encoder(4, 8, 48),
    "eva": _encoder(4, 8, 139),
    "eva02": _encoder(4, 8, 85),
    "convnext": _CONVNEXT,
    "convnext-conv-mlp": _CONVNEXT,
    "convnext-transformers": _convolutions("neurons", (32, 1), (64, 1), (96, 1), (96, 1)),
    "convnext-torchvision": _convolutions("neurons", (64, 1), (96, 1), (96, 1)),
    "mobilenet-timm": _convolutions("channels", (24, 1), (48, 1), (32, 1), (32, 1)),
    "mobilenetv4-timm": _convolutions("channels", (16, 1), (32, 1), (32, 1), (32, 1)),
    "mobilenet-grouped": _convolutions("channels", (4, 6), (8, 6)),
    "mobilenetv2-torchvision": _convolutions("channels", (24, 1), (48, 1), (48, 1), (32, 1), first=1),
    "mobilenetv3-torchvision": _convolutions("channels", (24, 1), (48, 1), first=1),
    "efficientnet-torchvision": _convolutions("channels", (16, 1), (32, 1), (32, 1), first=1),
    "regnetx-timm": _REGNET,
    "regnety-timm": _REGNET,
    "regnety-torchvision": _convolutions("channels", (4, 4), (4, 4), (6, 4)),
    "resnext-timm": _RESNEXT,
    "seresnext-timm": _RESNEXT,
    "resnext-torchvision": _convolutions("channels", (4, 4), (4, 4), (4, 8)),
    "seresnet-timm": _convolutions("channels", (8, 1), (8, 1), (16, 1), (24, 1), (32, 1)),
}
