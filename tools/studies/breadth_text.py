"""Architectures of breadth.py that read text or sound; all of them are of transformers and have attention."""

from __future__ import annotations

from typing import Any

from breadth_build import BLOCKS, HEADS, NEURONS, WIDTH, Architecture, Case, transformers_case

CLASSIFY, EMBED, TOKENS = "text-classification", "feature-extraction", "token-classification"
GENERATE, FILL, ANSWER = "text-generation", "fill-mask", "question-answering"
HEAR, TRANSCRIBE = "audio-classification", "automatic-speech-recognition"


def _text(kind: str, task: str = CLASSIFY, name: str | None = None, sentence: bool = False, **fields: Any) -> Case:
    return transformers_case(Architecture(kind, name, sentence=sentence, fields=fields), task)


def _other_names(kind: str, task: str = CLASSIFY, **fields: Any) -> Case:
    """A configuration that refuses the usual names of sizes."""
    return transformers_case(Architecture(kind, own_sizes=True, fields={"vocab_size": 1000, **fields}), task)


#: Fields of two halves, an encoder and a decoder.
_HALVES: dict[str, Any] = {
    "d_model": WIDTH,
    **{f"{half}_layers": 2 for half in ("encoder", "decoder")},
    **{f"{half}_attention_heads": HEADS for half in ("encoder", "decoder")},
    **{f"{half}_ffn_dim": NEURONS for half in ("encoder", "decoder")},
    "decoder_start_token_id": 2,
}
_T5: dict[str, Any] = {"d_model": WIDTH, "d_kv": 16, "d_ff": NEURONS, "num_layers": BLOCKS, "num_heads": HEADS}
_GROUPED: dict[str, Any] = {"num_key_value_heads": 2, "head_dim": 16}
_PAIRS: dict[str, Any] = {"num_key_value_heads": 2}
#: DeBERTa with its relative positions, as its checkpoints have them.
_DEBERTA: dict[str, Any] = {
    "relative_attention": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_biased_input": False,
}
_EXPERTS: dict[str, Any] = {
    **_PAIRS,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 64,
}
_SOUND: dict[str, Any] = {
    "conv_dim": [16, 16],
    "conv_stride": [10, 8],
    "conv_kernel": [10, 8],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}
#: As in large models: every layer is normalised, and padding is masked.
_MASKED: dict[str, Any] = {"feat_extract_norm": "layer", "do_stable_layer_norm": True}
_MOONSHINE: dict[str, Any] = {
    **{f"{half}_num_hidden_layers": 2 for half in ("encoder", "decoder")},
    **{f"{half}_num_attention_heads": HEADS for half in ("encoder", "decoder")},
}

ENCODERS = {
    "bert": _text("bert"),
    "bert-embedding": _text("bert", EMBED, sentence=True),
    "bert-tokens": _text("bert", TOKENS),
    "bert-answers": _text("bert", ANSWER),
    "bert-fill-mask": _text("bert", FILL),
    "bert-regression": _text("bert", num_labels=1),
    "roberta": _text("roberta"),
    "roberta-fill-mask": _text("roberta", FILL),
    "xlm-roberta": _text("xlm-roberta", EMBED),
    "xlm-roberta-xl": _text("xlm-roberta-xl"),
    "roberta-prelayernorm": _text("roberta-prelayernorm"),
    "camembert": _text("camembert"),
    "distilbert": _text("distilbert", dim=WIDTH, n_layers=BLOCKS, n_heads=HEADS, hidden_dim=NEURONS),
    "mpnet": _text("mpnet", EMBED),
    "electra": _text("electra", embedding_size=32),
    "albert": _text("albert", embedding_size=32),
    "deberta": _text("deberta", **_DEBERTA),
    "deberta-v3": _text("deberta-v2", **_DEBERTA, share_att_key=True, norm_rel_ebd="layer_norm", position_buckets=16),
    "modernbert": _text(
        "modernbert", EMBED, cls_token_id=2, sep_token_id=3, global_attn_every_n_layers=3, local_attention=16
    ),
    "modernbert-classes": _text("modernbert", cls_token_id=2, sep_token_id=3),
    "nomic-bert": _text("nomic_bert", EMBED),
    "gte": _text("gte", EMBED),
    "jina-v3": _text("jina_embeddings_v3", EMBED),
    "eurobert": _text("eurobert", EMBED),
    "ernie": _text("ernie", EMBED),
    "data2vec-text": _text("data2vec-text"),
    "esm": _text("esm", position_embedding_type="rotary", mask_token_id=4),
    "layoutlm": _text("layoutlm", TOKENS),
    "squeezebert": _text("squeezebert", embedding_size=WIDTH),
    "mobilebert": _text("mobilebert", embedding_size=32, intra_bottleneck_size=32, true_hidden_size=32),
    "convbert": _text("convbert", embedding_size=32),
    "rembert": _text("rembert", input_embedding_size=32, output_embedding_size=32),
    "roformer": _text("roformer", embedding_size=WIDTH),
    "fnet": _text("fnet"),
    "funnel": _other_names(
        "funnel", d_model=WIDTH, n_head=HEADS, d_head=16, d_inner=NEURONS, block_sizes=[1, 1], pad_token_id=0
    ),
    "longformer": _text("longformer", attention_window=16),
    "big-bird": _text("big_bird", block_size=8, attention_type="original_full"),
    "xlnet": _other_names("xlnet", d_model=WIDTH, n_layer=BLOCKS, n_head=HEADS, d_inner=NEURONS, pad_token_id=0),
    "flaubert": _other_names("flaubert", emb_dim=WIDTH, n_layers=BLOCKS, n_heads=HEADS, pad_index=0, n_words=1000),
    "dpr": _text("dpr", EMBED, "DPRQuestionEncoder"),
    "t5-encoder": _text("t5", EMBED, "T5EncoderModel", **_T5),
    "umt5-encoder": _text("umt5", EMBED, "UMT5EncoderModel", **_T5),
    "longt5": _text("longt5", EMBED, "LongT5EncoderModel", **_T5, local_radius=15),
    "longt5-global": _text(
        "longt5", EMBED, "LongT5EncoderModel", **_T5, local_radius=15, encoder_attention_type="transient-global"
    ),
    "bart": _text("bart", **_HALVES, forced_eos_token_id=3),
    "canine": _text("canine", type_vocab_size=2, downsampling_rate=2, local_transformer_stride=16),
}
DECODERS = {
    "gpt2": _text("gpt2", GENERATE, n_embd=WIDTH, n_layer=BLOCKS, n_head=HEADS, n_positions=128),
    "gpt2-classes": _text("gpt2", n_embd=WIDTH, n_layer=BLOCKS, n_head=HEADS, n_positions=128),
    "gpt-neo": _text("gpt_neo", GENERATE, attention_types=[[["global", "local", "global"], 1]]),
    "gpt-neox": _text("gpt_neox", GENERATE),
    "gptj": _text("gptj", GENERATE, n_embd=WIDTH, n_layer=BLOCKS, n_head=HEADS, n_positions=128, rotary_dim=8),
    "codegen": _text("codegen", GENERATE, n_embd=WIDTH, n_layer=BLOCKS, n_head=HEADS, n_positions=128, rotary_dim=8),
    "gpt-bigcode": _text("gpt_bigcode", GENERATE, n_embd=WIDTH, n_layer=BLOCKS, n_head=HEADS, n_positions=128),
    "opt": _text("opt", GENERATE, ffn_dim=NEURONS, word_embed_proj_dim=WIDTH),
    "bloom": _text("bloom", GENERATE, n_layer=BLOCKS, n_head=HEADS),
    "mpt": _text("mpt", GENERATE, d_model=WIDTH, n_heads=HEADS, n_layers=BLOCKS),
    "falcon": _text("falcon", GENERATE),
    "llama": _text("llama", GENERATE, **_PAIRS),
    "mistral": _text("mistral", GENERATE, **_GROUPED),
    "qwen2": _text("qwen2", GENERATE, **_PAIRS),
    "qwen3": _text("qwen3", GENERATE, **_GROUPED),
    "qwen3-embedding": _text("qwen3", EMBED, sentence=True, **_GROUPED),
    "qwen3-reranker": _text("qwen3", **_GROUPED),
    "gemma": _text("gemma", GENERATE, **_GROUPED),
    "gemma2": _text("gemma2", GENERATE, **_GROUPED, query_pre_attn_scalar=16),
    "gemma3": _text("gemma3_text", GENERATE, **_GROUPED),
    "embedding-gemma": _text(
        "gemma3_text",
        EMBED,
        sentence=True,
        num_key_value_heads=1,
        head_dim=16,
        use_bidirectional_attention=True,
        sliding_window=16,
    ),
    "phi": _text("phi", GENERATE),
    "phi3": _text("phi3", GENERATE, **_PAIRS),
    "olmo2": _text("olmo2", GENERATE),
    "granite": _text("granite", GENERATE, **_PAIRS),
    "starcoder2": _text("starcoder2", GENERATE, **_PAIRS),
    "stablelm": _text("stablelm", GENERATE, **_PAIRS),
    "cohere": _text("cohere", GENERATE, **_PAIRS),
    "smollm3": _text("smollm3", GENERATE, **_PAIRS),
    "qwen2-moe": _text("qwen2_moe", GENERATE, **_EXPERTS),
    "mixtral": _text("mixtral", GENERATE, **_PAIRS, num_local_experts=4),
}
SOUND = {
    "wav2vec2": _text("wav2vec2", HEAR, **_SOUND),
    "wav2vec2-ctc": _text("wav2vec2", TRANSCRIBE, "Wav2Vec2ForCTC", **_SOUND, **_MASKED),
    "wav2vec2-conformer": _text("wav2vec2-conformer", HEAR, **_SOUND, **_MASKED),
    "hubert": _text("hubert", HEAR, **_SOUND),
    "hubert-ctc": _text("hubert", TRANSCRIBE, "HubertForCTC", **_SOUND),
    "wavlm": _text("wavlm", HEAR, **_SOUND),
    "unispeech": _text("unispeech", HEAR, **_SOUND),
    "unispeech-sat": _text("unispeech-sat", HEAR, **_SOUND),
    "data2vec-audio": _text("data2vec-audio", HEAR, **_SOUND, **_MASKED),
    "sew": _text("sew", HEAR, **_SOUND, squeeze_factor=2),
    "sew-d": _text("sew-d", HEAR, **_SOUND, squeeze_factor=2),
    "moonshine": _text("moonshine", TRANSCRIBE, "MoonshineForConditionalGeneration", **_MOONSHINE),
    "audio-spectrogram": _text("audio-spectrogram-transformer", HEAR, max_length=64, num_mel_bins=32),
    "whisper": _text("whisper", TRANSCRIBE, "WhisperForConditionalGeneration", **_HALVES, max_source_positions=50),
    "whisper-encoder": _text("whisper", HEAR, **_HALVES, max_source_positions=50),
}
CASES: dict[str, Case] = {**ENCODERS, **DECODERS, **SOUND}
