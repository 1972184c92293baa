"""Small random models of transformers that no family knows, as modules from named tensors to one tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tests.conftest import enlarge

Inputs = dict[str, torch.Tensor]
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
TEXT = {
    **SMALL,
    "vocab_size": 64,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
IMAGE = {**SMALL, "image_size": 32, "patch_size": 8, "num_channels": 3}
SHARED = {"num_key_value_heads": 2, "head_dim": 8}
DEBERTA = {
    "relative_attention": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_biased_input": False,
    "share_att_key": True,
    "norm_rel_ebd": "layer_norm",
    "position_buckets": 8,
}
WAV2VEC2 = {
    "conv_dim": (8, 8),
    "conv_kernel": (4, 4),
    "conv_stride": (4, 4),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
}
WHISPER = {
    "d_model": 32,
    "encoder_layers": 2,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "num_mel_bins": 8,
    "max_source_positions": 12,
}
#: name -> class of transformers, fields of its configuration.
TEXTS: dict[str, tuple[str, dict[str, Any]]] = {
    "modernbert": ("ModernBertModel", {"cls_token_id": 2, "sep_token_id": 3, "local_attention": 8}),
    "deberta-v2": ("DebertaV2Model", DEBERTA),
    "gemma2": ("Gemma2Model", {**SHARED, "query_pre_attn_scalar": 8}),
    "gemma3": ("Gemma3TextModel", SHARED),
    "phi": ("PhiModel", {}),
    "phi3": ("Phi3Model", {"num_key_value_heads": 2}),
    "gpt-neox": ("GPTNeoXModel", {"rotary_pct": 0.5}),
    "gptj": ("GPTJModel", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48, "rotary_dim": 4, "n_positions": 40}),
    "opt": ("OPTModel", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "falcon": ("FalconModel", {}),
    "nomic": ("NomicBertModel", {}),
    "eurobert": ("EuroBertModel", {}),
    "albert": ("AlbertModel", {"embedding_size": 16}),
}
IMAGES: dict[str, tuple[str, dict[str, Any]]] = {
    "yolos": ("YolosModel", {"image_size": (32, 32), "num_detection_tokens": 3}),
    "dinov3": ("DINOv3ViTModel", {"num_register_tokens": 2}),
    "vit-msn": ("ViTMSNModel", {}),
}
SOUNDS: dict[str, tuple[str, dict[str, Any]]] = {"wav2vec2": ("Wav2Vec2Model", WAV2VEC2)}


class Plain(nn.Module):
    """A model of transformers whose output is its last hidden state."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        return self.model(**inputs).last_hidden_state


def unknown(name: str) -> tuple[nn.Module, Inputs]:
    """The model with weights under which every unit matters, and two rows of inputs."""
    import transformers

    generator = torch.Generator().manual_seed(1)
    if name in TEXTS:
        inputs: Inputs = {
            "input_ids": torch.randint(5, 64, (2, 12), generator=generator),
            "attention_mask": torch.ones(2, 12, dtype=torch.long),
        }
        kind, fields = TEXTS[name]
        fields = {**TEXT, **fields}
    elif name in IMAGES:
        inputs = {"pixel_values": torch.randn(2, 3, 32, 32, generator=generator)}
        kind, fields = IMAGES[name]
        fields = {**IMAGE, **fields}
    elif name in SOUNDS:
        inputs = {"input_values": torch.randn(2, 200, generator=generator)}
        kind, fields = SOUNDS[name]
        fields = {**SMALL, **fields}
    else:
        inputs = {"input_features": torch.randn(2, 8, 24, generator=generator)}
        config = transformers.WhisperConfig(**WHISPER)
        return plain(transformers.models.whisper.modeling_whisper.WhisperEncoder(config)), inputs
    family = getattr(transformers, kind)
    config = family.config_class(**fields)
    config._attn_implementation = "eager"
    return plain(family(config)), inputs


def plain(model: nn.Module) -> nn.Module:
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False
    enlarge(model)
    return Plain(model).eval().requires_grad_(False)


EVERY = (*TEXTS, *IMAGES, *SOUNDS, "whisper")
