"""Small random text models: encoders and decoders, and every task that is not one vector per row."""

from __future__ import annotations

from tests.units.builders import CLASSES, EMBEDDING, TEXT, Models, Units, from_transformers

TOKENS, SPANS, MASKED, CAUSAL = "token-classification", "question-answering", "fill-mask", "text-generation"
#: Two query heads for each key and value head.
GROUPED = {**TEXT, "num_key_value_heads": 2, "pad_token_id": 1}
MODELS: Models = {
    "bert-tokens": ("bert", TOKENS, from_transformers("BertForTokenClassification", **TEXT, num_labels=5)),
    "bert-spans": ("bert", SPANS, from_transformers("BertForQuestionAnswering", **TEXT)),
    "bert-masked": ("bert", MASKED, from_transformers("BertForMaskedLM", **TEXT)),
    "camembert": ("bert", CLASSES, from_transformers("CamembertForSequenceClassification", **TEXT)),
    "xlm-roberta-tokens": (
        "bert",
        TOKENS,
        from_transformers("XLMRobertaForTokenClassification", **TEXT, num_labels=5),
    ),
    "distilbert": (
        "distilbert",
        CLASSES,
        from_transformers("DistilBertForSequenceClassification", **TEXT, hidden_dim=64),
    ),
    "distilbert-spans": (
        "distilbert",
        SPANS,
        from_transformers("DistilBertForQuestionAnswering", **TEXT, hidden_dim=64),
    ),
    "distilbert-masked": ("distilbert", MASKED, from_transformers("DistilBertForMaskedLM", **TEXT, hidden_dim=64)),
    "mpnet": ("mpnet", EMBEDDING, from_transformers("MPNetModel", **TEXT)),
    "mpnet-tokens": ("mpnet", TOKENS, from_transformers("MPNetForTokenClassification", **TEXT, num_labels=5)),
    "gpt2": ("gpt2", CAUSAL, from_transformers("GPT2LMHeadModel", **TEXT, n_inner=64)),
    "llama": ("llama", CAUSAL, from_transformers("LlamaForCausalLM", **GROUPED)),
    "llama-tied": ("llama", CAUSAL, from_transformers("LlamaForCausalLM", **GROUPED, tie_word_embeddings=True)),
    "mistral": ("llama", CAUSAL, from_transformers("MistralForCausalLM", **GROUPED, head_dim=8, sliding_window=6)),
    "qwen2": ("llama", CAUSAL, from_transformers("Qwen2ForCausalLM", **GROUPED)),
    "qwen3": ("llama", CAUSAL, from_transformers("Qwen3ForCausalLM", **GROUPED, head_dim=8)),
    "qwen3-embedding": ("llama", EMBEDDING, from_transformers("Qwen3Model", **GROUPED, head_dim=8)),
    "gemma": ("llama", CAUSAL, from_transformers("GemmaForCausalLM", **GROUPED, head_dim=8)),
    "smollm3": ("llama", CAUSAL, from_transformers("SmolLM3ForCausalLM", **GROUPED)),
}
#: A unit of grouped-query attention is a key and value head with both of its query heads.
UNITS: Units = {
    name: {
        f"block{block:02d}.{kind}": size
        for block in range(3)
        for kind, size in (("heads", (2, 16)), ("neurons", (64, 1)))
    }
    for name, (family, _, _) in MODELS.items()
    if family == "llama"
}
