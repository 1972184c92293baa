"""A transformer with all modules of its sentence-transformers folder, as one task module."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from optin_export.models.sentence import chosen_steps, load_head
from optin_export.models.sentence_tokens import adapt_tokenizer, prompt_tokens
from optin_export.models.tasks import TaskModel, TextModel, wrap
from optin_export.models.tokenizer import load_tokenizer
from optin_export.recipe import ModelSection
from optin_export.sentence import SentenceFolder


def wrap_sentence(
    module: Any,
    architecture: dict[str, Any],
    section: ModelSection,
    folder: SentenceFolder,
    origin: str | None,
    load: Callable[[nn.Module, Path], None],
) -> tuple[TaskModel, list[str]]:
    """The task module of a transformer of `folder`, and warnings; adds what `build` needs to `architecture`.

    load: (module, weights file) fills one layer. Raises InputError for settings that the recipe cannot change.
    """
    steps, indices, warnings = chosen_steps(folder, section)
    if folder.prompt and any(step.get("include_prompt") is False for step in steps):
        tokenizer = load_tokenizer(section, origin, folder)
        skipped = prompt_tokens(tokenizer, folder.prompt, adapt_tokenizer(tokenizer, folder, module.config))
        steps = [{**step, "skip": skipped} if step.get("include_prompt") is False else step for step in steps]
    # The input preprocessing is not part of the graph, but decides its results.
    fed = {"prompt": folder.prompt, "max_length": folder.max_length, "lower": folder.lower}
    architecture["sentence"] = {"steps": steps, "activation": folder.activation, "fed": fed}
    model = wrap(module, section.task, section.pooling, bool(section.normalize), architecture["sentence"])
    if isinstance(model, TextModel) and model.head is not None and section.weights != "random":
        load_head(model.head, indices, folder, load)
        if section.weights != "pretrained" and folder.weights:
            warnings.append(f"Dense and LayerNorm modules keep the weights of {folder.source}: model.weights has none")
    return model, warnings
