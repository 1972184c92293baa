"""Small random models of sound with their feature extractors, as `from_pretrained` finds them, and recordings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from tests.conftest import enlarge

RATE = 16000
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
RAW = {
    **SMALL,
    "conv_dim": (16, 16),
    "conv_stride": (5, 4),
    "conv_kernel": (10, 4),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "classifier_proj_size": 16,
    "vocab_size": 12,
    "num_labels": 2,
}
MASKED = {"feat_extract_norm": "layer", "conv_bias": True, "do_stable_layer_norm": True}
WHISPER = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "vocab_size": 50,
    "num_mel_bins": 16,
    "max_source_positions": 50,
    "decoder_start_token_id": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_labels": 2,
}
#: Model class, its configuration, feature extractor, its settings, and the task.
KINDS: dict[str, tuple[str, dict[str, Any], str, dict[str, Any], str]] = {
    "wav2vec2": (
        "Wav2Vec2ForSequenceClassification",
        RAW,
        "Wav2Vec2FeatureExtractor",
        {"return_attention_mask": False},
        "audio-classification",
    ),
    "wav2vec2-masked": (
        "Wav2Vec2ForSequenceClassification",
        {**RAW, **MASKED},
        "Wav2Vec2FeatureExtractor",
        {"return_attention_mask": True},
        "audio-classification",
    ),
    "wav2vec2-ctc": (
        "Wav2Vec2ForCTC",
        {**RAW, **MASKED},
        "Wav2Vec2FeatureExtractor",
        {"return_attention_mask": True},
        "automatic-speech-recognition",
    ),
    "hubert-ctc": (
        "HubertForCTC",
        RAW,
        "Wav2Vec2FeatureExtractor",
        {"return_attention_mask": False},
        "automatic-speech-recognition",
    ),
    "whisper": (
        "WhisperForConditionalGeneration",
        WHISPER,
        "WhisperFeatureExtractor",
        {"feature_size": 16, "chunk_length": 1},
        "automatic-speech-recognition",
    ),
    "whisper-classes": (
        "WhisperForAudioClassification",
        WHISPER,
        "WhisperFeatureExtractor",
        {"feature_size": 16, "chunk_length": 1},
        "audio-classification",
    ),
    "ast": (
        "ASTForAudioClassification",
        {**SMALL, "max_length": 64, "num_mel_bins": 32, "num_labels": 2},
        "ASTFeatureExtractor",
        {"num_mel_bins": 32, "max_length": 64},
        "audio-classification",
    ),
}


def audio_folder(folder: Path, kind: str, **more: Any) -> Path:
    """A model folder of one of KINDS, with more fields of its configuration."""
    import transformers

    name, fields, extractor, settings, _ = KINDS[kind]
    model_class = getattr(transformers, name)
    enlarge(model_class(model_class.config_class(**{**fields, **more}))).save_pretrained(folder)
    getattr(transformers, extractor)(**settings).save_pretrained(folder)
    return folder


def noise(samples: int, seed: int, channels: int = 1) -> np.ndarray:
    """float32 [samples] or [samples, channels] in -1..1, as 16 bits hold it."""
    values = np.random.default_rng(seed).uniform(-0.8, 0.8, (samples, channels))
    return (np.round(values * 32767) / 32768).astype(np.float32).squeeze()


def recordings(folder: Path, lengths: tuple[int, ...] = (1600, 2400, 2000, 2400)) -> Path:
    """Files in two class folders, a and b, in turn."""
    for row, samples in enumerate(lengths):
        path = folder / "ab"[row % 2] / f"{row}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, noise(samples, row), RATE, subtype="PCM_16")
    return folder
