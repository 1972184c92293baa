"""A folder with everything a recipe can read, small and random, and a recipe for each kind of it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from tests.conftest import enlarge, two_tower_folder
from tests.robust.forked import VIT
from tests.sentence_folders import SIZES, bert

PRUNE = {"budget": {"macs": 0.7}, "probes": 4, "rows": 16, "score_samples": 8, "curve_samples": 8, "align": 1}
MAKE = f"""import timm
def make():
    return timm.create_model('vit_tiny_patch16_224', pretrained=False, **{VIT!r})
"""
ROWS = """import numpy as np
def rows():
    made = np.random.default_rng(0).integers(0, 256, (24, 16, 16), dtype=np.uint8)
    return {'image': list(made), 'label': [0, 1, 2] * 8}
"""


def write_inputs(folder: Path) -> None:
    """Data, models and checkpoints below `folder`, and NAME.yaml for every name of `recipes`."""
    import timm
    import torch
    import transformers
    from PIL import Image
    from safetensors.torch import save_file

    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (24, 16, 16), dtype=np.uint8)
    np.savez(folder / "images.npz", images=images, labels=generator.integers(0, 3, 24))
    for at, image in enumerate(images):
        place = folder / "images" / str(at % 3) / f"{at}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(place)
    rows = [f"a man by night,two dogs run {at},{at % 5}" for at in range(24)]
    (folder / "pairs.csv").write_text("\n".join(rows) + "\n")
    rows = [f"the guitar {at}\t{at % 3}" for at in range(24)]
    (folder / "classes.tsv").write_text("sentence\tlabel\n" + "\n".join(rows) + "\n")
    (folder / "classes.txt").write_text("man\ndogs\ngrass\n")
    vit = enlarge(timm.create_model("vit_tiny_patch16_224", pretrained=False, **VIT))
    save_file(vit.state_dict(), folder / "vit.safetensors")
    torch.save({"model": vit.state_dict()}, folder / "vit.pt")
    (folder / "model.py").write_text(MAKE)
    (folder / "rows.py").write_text(ROWS)
    bert(folder / "bert")
    shape = {"num_attention_heads": 4, "intermediate_size": 64, "max_position_embeddings": 64}
    bert(folder / "classifier")
    config = transformers.BertConfig(**SIZES, **shape, num_labels=3)
    enlarge(transformers.BertForSequenceClassification(config)).save_pretrained(folder / "classifier")
    bert(folder / "sentence")
    kinds = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    modules = [
        {"idx": at, "name": str(at), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for at, (path, kind) in enumerate(kinds)
    ]
    (folder / "sentence" / "modules.json").write_text(json.dumps(modules))
    (folder / "sentence" / "sentence_bert_config.json").write_text('{"max_seq_length": 16, "do_lower_case": false}')
    (folder / "sentence" / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 32, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    (folder / "sentence" / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    two_tower_folder(folder / "clip", "CLIP")
    for name, recipe in recipes().items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe))


def recipes() -> dict[str, dict[str, Any]]:
    """By name, each with the paths of `write_inputs`."""
    image: dict[str, Any] = {
        "source": "timm:vit_tiny_patch16_224",
        "task": "image-classification",
        "weights": "vit.safetensors",
        "args": VIT,
        "preprocess": {"size": [16, 16], "mean": [0.5], "std": [0.5]},
    }
    pairs = {"text": 0, "text_pair": 1, "label": 2}
    table = {"columns": {"text": "sentence", "label": "label"}}
    clip = {"source": "clip", "task": "zero-shot-image-classification", "classes": "classes.txt"}
    embedding = {"task": "feature-extraction"}
    made: dict[str, tuple[dict[str, Any], str, dict[str, Any], str]] = {
        "npz": (image, "npz:images.npz", {}, "accuracy"),
        "pt": ({**image, "weights": "vit.pt#model"}, "npz:images.npz", {}, "accuracy"),
        "python": ({**image, "source": "py:model.py:make", "args": {}}, "py:rows.py:rows", {}, "accuracy"),
        "images": (image, "images:images", {}, "accuracy"),
        "csv": ({**embedding, "source": "bert"}, "csv:pairs.csv", {"columns": pairs}, "spearman"),
        "tsv": ({"source": "classifier", "task": "text-classification"}, "tsv:classes.tsv", table, "accuracy"),
        "sentence": ({**embedding, "source": "sentence"}, "csv:pairs.csv", {"columns": pairs}, "spearman"),
        "clip": (clip, "images:images", {}, "accuracy"),
    }
    return {
        name: {
            "recipe": 1,
            "name": name,
            "model": model,
            "data": {
                "calibration": {"source": source, **more},
                "evaluation": {"source": source, **more, "metric": metric},
            },
            "prune": copy.deepcopy(PRUNE),
            "export": {"batch": [1, 2], "sequence": 16},
        }
        for name, (model, source, more, metric) in made.items()
    }
