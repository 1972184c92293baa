"""Architectures of breadth.py that read images, of transformers and timm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from breadth_build import BLOCKS, HEADS, NEURONS, VOCABULARY, WIDTH, Architecture, Case, timm_case, transformers_case

CLASSIFY, EMBED, ZERO_SHOT = "image-classification", "image-feature-extraction", "zero-shot-image-classification"
SEGMENT, DETECT, DEPTH = "image-segmentation", "object-detection", "depth-estimation"
STAGES = ["stage1", "stage2", "stage3", "stage4"]


def _vit(kind: str, task: str = CLASSIFY, name: str | None = None, **fields: Any) -> Case:
    """The usual sizes."""
    return transformers_case(Architecture(kind, name, fields=fields), task)


def _stages(
    kind: str,
    task: str = CLASSIFY,
    name: str | None = None,
    attention: bool = False,
    edit: Callable[[Any], None] | None = None,
    size: int = 64,
    **fields: Any,
) -> Case:
    """A configuration with sizes of its own."""
    return transformers_case(Architecture(kind, name, True, edit, fields=fields), task, attention, size)


def _backbone(kind: str, **fields: Any) -> Callable[[Any], None]:
    """Put a backbone of this kind into the configuration of a detector or segmenter."""

    def edit(config: Any) -> None:
        import transformers

        config.backbone_config = transformers.CONFIG_MAPPING[kind](**fields)

    return edit


def _maskformer(config: Any) -> None:
    """A small backbone and a small decoder, that of DETR."""
    import transformers

    _backbone("maskformer-swin", **_SWIN_BACKBONE)(config)
    config.decoder_config = transformers.DetrConfig(**_DETECTOR)


def _towers(kind: str, task: str, name: str, model: dict[str, Any] | None = None, **fields: Any) -> Case:
    """A text and an image encoder."""

    def edit(config: Any) -> None:
        text = {"vocab_size": VOCABULARY, "max_position_embeddings": 64, "projection_size": WIDTH}
        text |= {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
        image = {"image_size": 64, "patch_size": 16, "num_patches": 16}
        sizes = {"hidden_size": WIDTH, "num_hidden_layers": BLOCKS, "num_attention_heads": HEADS}
        for part, own in ((config.text_config, text), (config.vision_config, image)):
            for name, value in {**sizes, "intermediate_size": NEURONS, **own}.items():
                setattr(part, name, value)

    return transformers_case(Architecture(kind, name, True, edit, fields=fields), task, model=model)


_FOUR: dict[str, Any] = {"hidden_sizes": [16, 32, 32, 64], "depths": [1, 1, 1, 1]}
_RESNET: dict[str, Any] = {**_FOUR, "embedding_size": 16}
_SWIN: dict[str, Any] = {"image_size": 64, "embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 4]}
_SWIN_BACKBONE: dict[str, Any] = {**_SWIN, "window_size": 2, "out_features": STAGES}
_DETECTOR: dict[str, Any] = {
    "d_model": 32,
    "num_queries": 10,
    **{f"{half}_layers": 2 for half in ("encoder", "decoder")},
    **{f"{half}_attention_heads": 4 for half in ("encoder", "decoder")},
    **{f"{half}_ffn_dim": 64 for half in ("encoder", "decoder")},
}
_LAST = {**_RESNET, "out_features": STAGES[-1:]}
_CLASSES = {"classes": ["cat", "dog", "plane"], "prompt": "a photo of a {}"}

TRANSFORMERS = {
    "vit-hf": _vit("vit"),
    "vit-hf-embedding": _vit("vit", EMBED),
    "deit-hf": _vit("deit", name="DeiTForImageClassification"),
    "deit-hf-teacher": _vit("deit", name="DeiTForImageClassificationWithTeacher", num_labels=5),
    "beit-hf": _vit("beit"),
    "data2vec-vision": _vit("data2vec-vision"),
    "dinov2-hf": _vit("dinov2"),
    "dinov2-hf-embedding": _vit("dinov2", EMBED),
    "dinov2-registers-hf": _vit("dinov2_with_registers"),
    "dinov3-hf": _vit("dinov3_vit", EMBED),
    "vit-msn": _vit("vit_msn"),
    "vit-mae-embedding": _vit("vit_mae", EMBED),
    "ijepa": _vit("ijepa"),
    "videomae": _vit("videomae", "video-classification", "VideoMAEForVideoClassification", num_frames=2),
    "swin-hf": _stages(
        "swin", attention=True, image_size=64, embed_dim=32, depths=[2, 2], num_heads=[2, 4], window_size=4
    ),
    "swinv2-hf": _stages(
        "swinv2", attention=True, image_size=64, embed_dim=32, depths=[2, 2], num_heads=[2, 4], window_size=4
    ),
    "pvt-v2-hf": _stages("pvt_v2", attention=True, image_size=64),
    "levit-hf": _stages(
        "levit",
        name="LevitForImageClassification",
        attention=True,
        image_size=64,
        hidden_sizes=[32, 48, 64],
        depths=[1, 1, 1],
    ),
    "hiera-hf": _stages(
        "hiera", attention=True, image_size=[64, 64], embed_dim=16, depths=[1, 1, 1, 1], num_heads=[1, 2, 4, 8]
    ),
    "cvt-hf": _stages(
        "cvt",
        attention=True,
        embed_dim=[16, 32, 64],
        num_heads=[1, 2, 4],
        depth=[1, 2, 3],
    ),
    "mobilevit-hf": _stages("mobilevit", attention=True, image_size=64),
    "segformer-classes": _stages("segformer", attention=True, **_FOUR, num_attention_heads=[1, 2, 2, 4]),
    "convnext-hf": _stages("convnext", hidden_sizes=[16, 32, 32, 32], depths=[1, 1, 2, 1]),
    "convnextv2-hf": _stages("convnextv2", hidden_sizes=[16, 32, 32, 32], depths=[1, 1, 2, 1]),
    "resnet-hf": _stages("resnet", **_RESNET),
    "regnet-hf": _stages("regnet", **_RESNET, groups_width=8),
    "poolformer-hf": _stages("poolformer", image_size=64, **_FOUR),
    "mobilenet-v1-hf": _stages("mobilenet_v1", image_size=64, depth_multiplier=0.5),
    "mobilenet-v2-hf": _stages("mobilenet_v2", image_size=64, depth_multiplier=0.5),
    "efficientnet-hf": _stages(
        "efficientnet", image_size=64, width_coefficient=0.5, depth_coefficient=0.5, hidden_dim=640
    ),
    "clip-zero-shot": _towers("clip", ZERO_SHOT, "CLIPModel", _CLASSES, projection_dim=32),
    "clip-image": _towers("clip", EMBED, "CLIPModel", projection_dim=32),
    "clip-text": _towers("clip", "feature-extraction", "CLIPModel", projection_dim=32),
    "siglip-image": _towers("siglip", EMBED, "SiglipModel"),
    "siglip2-image": _towers("siglip2", EMBED, "Siglip2Model"),
    "metaclip2-image": _towers("metaclip_2", EMBED, "MetaClip2Model", projection_dim=32),
    "chinese-clip-image": _towers("chinese_clip", EMBED, "ChineseCLIPModel", projection_dim=32),
    "owlvit-image": _towers("owlvit", EMBED, "OwlViTModel", projection_dim=32),
}
DENSE = {
    "segformer": _stages(
        "segformer",
        SEGMENT,
        attention=True,
        **_FOUR,
        num_attention_heads=[1, 2, 2, 4],
        decoder_hidden_size=64,
        num_labels=5,
    ),
    "beit-segmentation": _vit(
        "beit", SEGMENT, num_labels=5, num_hidden_layers=4, out_indices=[1, 2, 3, 4], use_auxiliary_head=False
    ),
    "mask2former": _stages(
        "mask2former",
        SEGMENT,
        "Mask2FormerForUniversalSegmentation",
        True,
        _backbone("swin", **_SWIN_BACKBONE),
        num_labels=5,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=64,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=4,
        dim_feedforward=64,
        num_queries=10,
    ),
    "maskformer": _stages(
        "maskformer",
        SEGMENT,
        "MaskFormerForInstanceSegmentation",
        True,
        _maskformer,
        num_labels=5,
        fpn_feature_size=32,
        mask_feature_size=32,
    ),
    "upernet": _stages(
        "upernet",
        SEGMENT,
        edit=_backbone("convnext", **_FOUR, out_features=STAGES),
        num_labels=5,
        hidden_size=32,
        auxiliary_in_channels=32,
        pool_scales=[1, 2],
    ),
    "mobilevit-deeplab": _stages("mobilevit", SEGMENT, attention=True, image_size=64, num_labels=5),
    "depth-anything": _stages(
        "depth_anything",
        DEPTH,
        attention=True,
        size=56,
        patch_size=14,
        reassemble_hidden_size=WIDTH,
        neck_hidden_sizes=[16, 32, 32, 32],
        fusion_hidden_size=32,
        edit=_backbone(
            "dinov2",
            hidden_size=WIDTH,
            num_hidden_layers=4,
            num_attention_heads=4,
            image_size=56,
            out_indices=[1, 2, 3, 4],
            reshape_hidden_states=False,
        ),
    ),
    "yolos": _vit("yolos", DETECT, image_size=[64, 64], num_detection_tokens=10),
    "detr": _stages("detr", DETECT, attention=True, edit=_backbone("resnet", **_LAST), **_DETECTOR),
    "conditional-detr": _stages(
        "conditional_detr", DETECT, attention=True, edit=_backbone("resnet", **_LAST), **_DETECTOR
    ),
    "rt-detr": _stages(
        "rt_detr",
        DETECT,
        attention=True,
        edit=_backbone("rt_detr_resnet", **_RESNET, out_features=STAGES[1:]),
        d_model=32,
        encoder_hidden_dim=32,
        encoder_in_channels=[32, 32, 64],
        decoder_in_channels=[32, 32, 32],
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        decoder_layers=2,
        num_queries=10,
    ),
    "sam": _stages("sam", EMBED, "SamModel", True),
}

_PLAIN: dict[str, Any] = {"embed_dim": WIDTH, "depth": BLOCKS, "num_heads": HEADS, "img_size": 64}
_FOURTEEN: dict[str, Any] = {**_PLAIN, "img_size": 56}
_WINDOWS: dict[str, Any] = {"embed_dim": 32, "depths": (2, 2, 2), "num_heads": (2, 4, 8), "img_size": 64}
#: With attention: name in timm, size and arguments.
_ATTENTION: dict[str, tuple[str, int, dict[str, Any]]] = {
    "vit-timm": ("vit_tiny_patch16_224", 64, _PLAIN),
    "vit-timm-embedding": ("vit_tiny_patch16_224", 64, {**_PLAIN, "num_classes": 0}),
    "vit-timm-gap": ("vit_medium_patch16_gap_256", 64, _PLAIN),
    "deit-timm": ("deit_tiny_patch16_224", 64, _PLAIN),
    "deit-distilled-timm": ("deit_tiny_distilled_patch16_224", 64, _PLAIN),
    "beit-timm": ("beit_base_patch16_224", 64, _PLAIN),
    "dinov2-registers-timm": ("vit_small_patch14_reg4_dinov2", 56, _FOURTEEN),
    "dinov3-timm": ("vit_small_patch16_dinov3", 64, _PLAIN),
    "siglip-timm": ("vit_base_patch16_siglip_224", 64, _PLAIN),
    "clip-timm": ("vit_base_patch16_clip_224", 64, _PLAIN),
    "eva02-timm": ("eva02_tiny_patch14_224", 56, _FOURTEEN),
    "swin-timm": ("swin_tiny_patch4_window7_224", 64, {**_WINDOWS, "window_size": 4}),
    "swinv2-timm": ("swinv2_tiny_window8_256", 64, {**_WINDOWS, "window_size": 4}),
    "xcit": ("xcit_nano_12_p8_224", 64, {**_PLAIN, "cls_attn_layers": 1}),
    "cait": ("cait_xxs24_224", 64, _PLAIN),
    "convit": ("convit_tiny", 64, {"img_size": 64}),
    "coat": ("coat_lite_tiny", 64, {"img_size": 64, "embed_dims": (32, 64, 64, 64), "serial_depths": (1, 1, 1, 1)}),
    "crossvit": (
        "crossvit_tiny_240",
        240,
        {"embed_dim": (32, 64), "depth": ((1, 2, 0), (1, 1, 0)), "num_heads": (2, 4)},
    ),
    "pit": ("pit_ti_224", 224, {}),
    "levit-timm": ("levit_128s", 224, {}),
    "volo": ("volo_d1_224", 64, {"img_size": 64}),
    "davit": ("davit_tiny", 64, {"depths": (1, 1, 1, 1), "embed_dims": (16, 32, 64, 64), "num_heads": (1, 2, 4, 4)}),
    "gcvit": ("gcvit_xxtiny", 64, {"img_size": 64, "embed_dim": 32}),
    "pvt-v2": ("pvt_v2_b0", 64, {}),
    "twins": ("twins_svt_small", 64, {}),
    "mvitv2": ("mvitv2_tiny", 64, {"img_size": 64}),
    "hiera-timm": ("hiera_tiny_224", 64, {"img_size": (64, 64), "embed_dim": 32, "stages": (1, 1, 1, 1)}),
    "nextvit": ("nextvit_small", 64, {}),
    "mobilevit": ("mobilevit_xxs", 64, {}),
    "mobilevitv2": ("mobilevitv2_050", 64, {}),
    "efficientformer": ("efficientformer_l1", 224, {}),
    "efficientvit": ("efficientvit_b0", 64, {}),
    "tinyvit": ("tiny_vit_5m_224", 224, {}),
    "edgenext": ("edgenext_xx_small", 64, {}),
    "maxvit": (
        "maxvit_tiny_tf_224",
        64,
        {"img_size": 64, "embed_dim": (32, 64), "depths": (1, 1), "stem_width": 32},
    ),
    "coatnet": (
        "coatnet_0_rw_224",
        64,
        {"img_size": 64, "embed_dim": (32, 64, 64, 64), "depths": (1, 1, 1, 1), "stem_width": (16, 32)},
    ),
    "mobilenetv4-hybrid": ("mobilenetv4_hybrid_medium", 64, {}),
    "botnet": ("botnet26t_256", 256, {}),
}
_NARROW: dict[str, Any] = {"channels": (16, 32, 48, 64), "layers": (1, 1, 1, 1)}
#: Without attention.
_OTHERS: dict[str, tuple[str, int, dict[str, Any]]] = {
    **{f"{name}-timm": (name, 64, _NARROW) for name in ("resnet18", "resnet50", "resnet26d", "seresnet18")},
    **{name: (name, 64, _NARROW) for name in ("wide_resnet50_2", "resnetaa50", "ecaresnet26t", "resnest14d")},
    "skresnet18": ("skresnet18", 64, _NARROW),
    "resnext26ts": ("resnext26ts", 64, {}),
    "resnext50": ("resnext50_32x4d", 64, {**_NARROW, "channels": (32, 64, 96, 128)}),
    **{name: (name, 64, {}) for name in ("res2net50_26w_4s", "resnetv2_18", "nf_resnet26", "nfnet_l0", "dpn48b")},
    **{name: (name, 64, {}) for name in ("efficientnet_b0", "tf_efficientnet_b0", "tf_efficientnetv2_b0")},
    **{name: (name, 64, {}) for name in ("mobilenetv2_050", "mobilenetv3_small_075", "mobilenetv4_conv_small")},
    **{name: (name, 64, {}) for name in ("mnasnet_small", "fbnetc_100", "tinynet_e", "mixnet_s", "lcnet_050")},
    **{name: (name, 64, {}) for name in ("hardcorenas_a", "ghostnet_050", "rexnet_100", "repvgg_a0", "mobileone_s0")},
    **{
        name: (name, 64, {})
        for name in ("regnetx_002", "regnety_002", "convnext_atto", "convnextv2_atto", "repvit_m0_9")
    },
    **{name: (name, 64, {}) for name in ("vgg11_bn", "densenet121", "cspdarknet53", "ese_vovnet19b_dw", "selecsls42")},
    **{name: (name, 64, {}) for name in ("hrnet_w18_small", "dla34", "hgnet_tiny", "mambaout_femto", "starnet_s1")},
    **{name: (name, 96, {}) for name in ("inception_v4", "legacy_xception")},
    "poolformer": ("poolformer_s12", 64, {}),
    "fastvit": ("fastvit_t8", 64, {}),
    "focalnet": ("focalnet_tiny_srf", 64, {}),
    "resmlp": ("resmlp_12_224", 64, {"img_size": 64}),
    "mixer": ("mixer_s32_224", 64, {"img_size": 64}),
    "gmlp": ("gmlp_s16_224", 64, {"img_size": 64}),
    "convmixer": ("convmixer_768_32", 64, {}),
}
TIMM = {
    name: timm_case(model, attention, size, **arguments)
    for attention, table in ((True, _ATTENTION), (False, _OTHERS))
    for name, (model, size, arguments) in table.items()
}
CASES: dict[str, Case] = {**TRANSFORMERS, **DENSE, **TIMM}
