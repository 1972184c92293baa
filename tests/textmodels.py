"""Small random text models with their tokenizers, as `from_pretrained` finds them, and a recipe for each text task."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from tests.conftest import WORDS, enlarge, sentences

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}
NAMES = ["O", "B-THING", "I-THING"]


def word_pieces(folder: Path) -> int:
    """BERT's kind of tokenizer; returns the size of its vocabulary."""
    import transformers

    vocabulary = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *sorted(set(WORDS.split()) - {"guitar"}),
        "gui",
        "##tar",
    ]
    (folder / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    transformers.BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=64).save_pretrained(folder)
    return len(vocabulary)


def byte_pairs(folder: Path) -> int:
    """GPT-2's kind of tokenizer, without a padding token."""
    import tokenizers
    import transformers

    trained = tokenizers.ByteLevelBPETokenizer()
    trained.train_from_iterator(sentences(50), vocab_size=300, special_tokens=["<|endoftext|>"], show_progress=False)
    (folder / "raw.json").write_text(trained.to_str(), encoding="utf-8")
    transformers.GPT2TokenizerFast(
        tokenizer_file=str(folder / "raw.json"), eos_token="<|endoftext|>", bos_token="<|endoftext|>"
    ).save_pretrained(folder)
    return trained.get_vocab_size()


def save_small(folder: Path, class_name: str, **config: Any) -> Path:
    """A model of this class with large random weights, and a tokenizer of its kind."""
    import transformers

    model_class = getattr(transformers, class_name)
    words = (byte_pairs if class_name.startswith(("GPT2", "Llama")) else word_pieces)(folder)
    model = model_class(model_class.config_class(vocab_size=words, **{**SMALL, **config}))
    enlarge(model).save_pretrained(folder)
    return folder


def spoken(folder: Path, count: int = 40) -> Path:
    """rows.py: functions that give data for each task."""
    generator = np.random.default_rng(1)
    words = [text.split() for text in sentences(count, 5)]
    tags = [[NAMES[generator.integers(3)] for _ in row] for row in words]
    contexts = [" ".join(row) for row in words]
    answers = [{"text": [row[len(row) // 2]], "answer_start": [0]} for row in words]
    data = {
        "tokens": {"tokens": words, "label": tags},
        "questions": {"question": ["what is it"] * count, "context": contexts, "label": answers},
        "texts": {"text": contexts},
    }
    (folder / "rows.json").write_text(json.dumps(data), encoding="utf-8")
    lines = [f"DATA = __import__('json').load(open({str(folder / 'rows.json')!r}))"]
    lines += [f"def {name}(): return DATA[{name!r}]" for name in data]
    (folder / "rows.py").write_text("\n".join(lines), encoding="utf-8")
    return folder / "rows.py"


#: Task -> (class of the model, its settings, data, metrics).
TASKS: dict[str, tuple[str, dict[str, Any], str, tuple[str, ...]]] = {
    "token-classification": (
        "BertForTokenClassification",
        {"id2label": dict(enumerate(NAMES)), "label2id": {name: index for index, name in enumerate(NAMES)}},
        "tokens",
        ("accuracy", "f1"),
    ),
    "question-answering": ("BertForQuestionAnswering", {}, "questions", ("squad_f1", "exact_match")),
    "fill-mask": ("BertForMaskedLM", {}, "texts", ("accuracy", "perplexity")),
    "text-generation": (
        "LlamaForCausalLM",
        {"num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 0, "tie_word_embeddings": True},
        "texts",
        ("accuracy", "perplexity"),
    ),
}


def recipe_for(task: str, folder: Path, rows: Path, **sections: Any) -> dict[str, Any]:
    _, _, data, metrics = TASKS[task]
    source = f"py:{rows}:{data}"
    return {
        "recipe": 1,
        "name": f"tiny-{task}",
        "model": {"source": str(folder), "task": task},
        "data": {
            "calibration": {"source": source, "samples": 32},
            "evaluation": {"source": source, "metric": metrics[0]},
        },
        "prune": {"budget": {"macs": 0.7}, "probes": 12, "rows": 64, "score_samples": 16},
        "export": {"batch": [1, 3], "sequence": 24},
        **sections,
    }
