"""Tokenizer and processor files, copied as the unpruned model's folder has them."""

from __future__ import annotations

import shutil
from pathlib import Path

from optin_export.formats.run import FinishedRun
from optin_export.recipe import Recipe
from optin_export.sentence import Files

#: Names under which transformers looks for them.
PROCESSORS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "spm.model",
    "sentencepiece.bpe.model",
    "tokenizer.model",
    "chat_template.jinja",
    "preprocessor_config.json",
    "processor_config.json",
    "generation_config.json",
)


def copy_processors(run: FinishedRun, folder: Path) -> None:
    """Copy what the unpruned model's folder has of `PROCESSORS`; a tokenizer that the recipe names comes from there."""
    tokenizer = _named(run.recipe)
    for name in PROCESSORS:
        found = tokenizer.find(name) if tokenizer is not None and "process" not in name else run.original(name)
        if found is not None:
            shutil.copyfile(found, folder / name)
    served = run.folder / "preprocess" / "tokenizer.json"
    if run.recipe.is_text and not (folder / "tokenizer_config.json").exists() and served.is_file():
        shutil.copyfile(served, folder / "tokenizer.json")


def _named(recipe: Recipe) -> Files | None:
    return None if recipe.model.tokenizer is None else Files(recipe.model.tokenizer, False)
