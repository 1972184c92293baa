"""Seconds in which units are found and verified in models of the sizes that users bring, by measurement alone.

    python tools/studies/study_discovery.py [NAMES]     writes docs/measurements/studies/discovery.json

The models have random weights and their usual configuration; families of this package are not asked. Each is measured
once, in a forked process of its own, with one thread, on two rows. Found: gradients between the layers. Verified: the
rebuilt models equal the masked ones, their sizes and costs. The load of the machine is recorded: CPU seconds depend on
it much less than seconds by the clock.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from optin_export.environment import describe
from optin_export.errors import InputError
from optin_export.models import wrap
from optin_export.models.adapt import readable
from optin_export.models.equivalents import use_equivalents
from optin_export.workdir.files import write_json

ROOT = Path(__file__).resolve().parents[2]
RESULT = ROOT / "docs" / "measurements" / "studies" / "discovery.json"
#: Tokens of a text.
TOKENS = 128
Inputs = dict[str, torch.Tensor]


def _text(kind: str, model_class: str, task: str, **fields: Any) -> tuple[Any, Inputs]:
    import transformers

    config = transformers.CONFIG_MAPPING[kind](**fields, attn_implementation="eager")
    ids = torch.randint(5, config.vocab_size, (2, TOKENS), generator=torch.Generator().manual_seed(0))
    return _task(getattr(transformers, model_class)(config), task), {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
    }


def _image(name: str) -> tuple[Any, Inputs]:
    import timm

    pixels = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    return _task(timm.create_model(name), "image-classification"), {"pixel_values": pixels}


def _task(module: Any, task: str) -> Any:
    readable(module)
    use_equivalents(module)
    return wrap(module, task)


#: A Llama of 0.1 billion parameters.
_LLAMA = {
    **{"vocab_size": 32000, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12},
    **{"num_attention_heads": 12, "num_key_value_heads": 4, "tie_word_embeddings": True},
}
MODELS: dict[str, Callable[[], tuple[Any, Inputs]]] = {
    "BERT-base": lambda: _text("bert", "BertForSequenceClassification", "text-classification"),
    "ViT-B/16": lambda: _image("vit_base_patch16_224"),
    "ResNet-50": lambda: _image("resnet50"),
    "Llama, 0.1 B": lambda: _text("llama", "LlamaForCausalLM", "text-generation", **_LLAMA),
}


def measured(name: str) -> dict[str, Any]:
    """The row of a model: parameters, `found` and `verified` (CPU and clock seconds), units by kind, loads."""
    from optin_export.pruning import verified
    from optin_export.units.discovery import found_structure
    from optin_export.units.trace import observe_pass

    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    row: dict[str, Any] = {"parameters": sum(one.numel() for one in model.parameters())}
    before = os.getloadavg()[0]
    with _timed(row, "found"):
        structure = found_structure(model, inputs, observe_pass(model, inputs), None)
    with _timed(row, "verified"):
        structure = verified(model, structure, inputs)
    row["load"] = [round(before, 1), round(os.getloadavg()[0], 1)]
    counts = Counter[str]()
    for group in structure.groups:
        counts[group.kind] += group.count
    row["units"], row["groups"] = dict(counts), len(structure.groups)
    row["refused"] = [f"{one.error.what}: {one.error.why}" for one in structure.refused]
    return row


@contextlib.contextmanager
def _timed(row: dict[str, Any], name: str) -> Iterator[None]:
    clock, used = time.monotonic(), time.process_time()
    yield
    row[name] = {"cpu": round(time.process_time() - used, 1), "clock": round(time.monotonic() - clock, 1)}


def forked(name: str) -> dict[str, Any]:
    """`measured` in a process of its own, which starts with nothing in memory but the libraries."""
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        code = 1
        try:
            with os.fdopen(writing, "w", encoding="utf-8") as file:
                json.dump(measured(name), file)
            code = 0
        except InputError as error:
            print(f"{name}: {error}", file=sys.stderr)
        finally:
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading, encoding="utf-8") as file:
        text = file.read()
    os.waitpid(pid, 0)
    if not text:
        raise SystemExit(f"{name} could not be measured")
    row: dict[str, Any] = json.loads(text)
    return row


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(MODELS)}; default: all without a row")
    options = parser.parse_args(arguments)
    if unknown := sorted(set(options.names) - set(MODELS)):
        raise SystemExit(f"no such model: {', '.join(unknown)}")
    torch.set_num_threads(1)
    rows = json.loads(RESULT.read_text(encoding="utf-8"))["rows"] if RESULT.is_file() else {}
    for name in options.names or [name for name in MODELS if name not in rows]:
        rows[name] = forked(name)
        facts = {"tokens": TOKENS, "cores": os.cpu_count(), "environment": describe()}
        write_json(RESULT, {**facts, "rows": {one: rows[one] for one in MODELS if one in rows}})
        print(name, json.dumps(rows[name]), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
