"""Tiny folders of sentence-transformers, written by that library itself."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tests.conftest import WORDS, enlarge, sentences

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(set(WORDS.split())), "query", ":"]
LONGEST = 10
#: Short ones, one in capitals, and some that are cut at LONGEST tokens.
TEXTS = [*sentences(8, 5), "TWO dogs RUN by night", "a", " ".join(WORDS.split()), " ".join(reversed(WORDS.split()))]
SIZES: dict[str, Any] = {"vocab_size": len(VOCABULARY), "hidden_size": 32, "num_hidden_layers": 2}


def save_tokenizer(folder: Path, lower: bool = True, **options: Any) -> None:
    import transformers

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY), encoding="utf-8")
    transformers.BertTokenizerFast(
        str(folder / "vocab.txt"), do_lower_case=lower, model_max_length=64, **options
    ).save_pretrained(folder)


def bert(folder: Path, **options: Any) -> Path:
    """A BERT of two small blocks and its tokenizer."""
    import transformers

    save_tokenizer(folder, **options)
    shape = {"num_attention_heads": 4, "intermediate_size": 64, "max_position_embeddings": 64}
    enlarge(transformers.BertModel(transformers.BertConfig(**SIZES, **shape))).save_pretrained(folder)
    return folder


def decoder(folder: Path) -> Path:
    """A Llama whose tokenizer pads on the left, as decoders that make embeddings are saved."""
    import transformers

    save_tokenizer(folder, padding_side="left")
    shape = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64}
    config = transformers.LlamaConfig(**SIZES, **shape, max_position_embeddings=64, pad_token_id=0)
    enlarge(transformers.LlamaModel(config)).save_pretrained(folder)
    return folder


def t5(folder: Path) -> Path:
    import transformers

    save_tokenizer(folder)
    shape = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "pad_token_id": 0}
    config = transformers.T5Config(vocab_size=len(VOCABULARY), **shape, decoder_start_token_id=0)
    enlarge(transformers.T5EncoderModel(config)).save_pretrained(folder)
    return folder


def build(folder: Path, base: Path, modules: Sequence[Any], longest: int | None = LONGEST, **options: Any) -> Path:
    """Save Transformer(base) and the modules as a SentenceTransformer; random weights that matter."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Transformer

    for at, module in enumerate(modules):
        if sum(1 for _ in module.parameters()):
            enlarge(module, 10 + at)
    first = Transformer(str(base), max_seq_length=longest)
    SentenceTransformer(modules=[first, *modules], device="cpu", **options).save(str(folder), create_model_card=False)
    return folder


def encode(folder: Path, texts: Sequence[str]) -> torch.Tensor:
    """What the library gives."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    # One at a time: no padding, by whichever side and however the model takes it.
    return model.encode(list(texts), batch_size=1, convert_to_tensor=True, show_progress_bar=False)


def change(path: Path, **fields: Any) -> None:
    """Set fields of a JSON object in a file; None removes one."""
    value = {**json.loads(path.read_text(encoding="utf-8")), **fields}
    path.write_text(json.dumps({name: item for name, item in value.items() if item is not None}), encoding="utf-8")
