"""The tokenizer that belongs to a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from optin_export.errors import InputError
from optin_export.recipe import ModelSection
from optin_export.sentence import SentenceFolder


def load_tokenizer(section: ModelSection, origin: str | None, sentence: SentenceFolder | None = None) -> Any:
    """`model.tokenizer`, or the tokenizer of the model; raises InputError if it cannot be loaded or cannot pad.

    sentence: what a folder of sentence-transformers says about its tokenizer.
    """
    import transformers

    name = section.tokenizer or origin
    if name is None:
        raise InputError("the model has no tokenizer", "its source has none", "set model.tokenizer to a folder")
    # Single words follow a blank, which is part of a token for GPT-2's and RoBERTa's tokenizers.
    options: dict[str, Any] = {"add_prefix_space": True} if section.task == "token-classification" else {}
    if sentence is not None:
        options |= sentence.tokenizer_args
        if sentence.subfolder and section.tokenizer is None:
            options["subfolder"] = sentence.subfolder
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            name, trust_remote_code=section.trust_remote_code, **options
        )
    except Exception as error:  # missing files, broken JSON and network errors come as many types
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"cannot load the tokenizer of {name}", reason, "set model.tokenizer to a folder") from error
    _refuse_empty(tokenizer, str(Path(name, options.get("subfolder", ""))))
    return fitted_tokenizer(tokenizer, name, section.task)


def fitted_tokenizer(tokenizer: Any, name: str, task: str) -> Any:
    """Adapt a tokenizer, in place, to the task's processors. Raises InputError if it cannot be used."""
    if tokenizer.pad_token is None and task == "text-generation":
        tokenizer.pad_token = tokenizer.eos_token  # hidden by the attention mask, so any token will do
    tokenizer.padding_side = "right"  # positions count from the first token
    _refuse_unfit(tokenizer, name, task)
    return tokenizer


def _refuse_empty(tokenizer: Any, name: str) -> None:
    """For a folder without a vocabulary transformers creates a tokenizer without words."""
    folder, files = Path(name), {"tokenizer.json", *type(tokenizer).vocab_files_names.values()}
    if not folder.is_dir() or not type(tokenizer).vocab_files_names:
        return
    if not any(any(folder.glob(pattern)) for pattern in (*files, "*.model", "*.tiktoken", "tekken.json")):
        raise InputError(
            f"cannot load the tokenizer of {name}",
            f"none of its files exists ({', '.join(sorted(files))})",
            "save the tokenizer of the model there, or set model.tokenizer to a folder that holds it",
        )


def _refuse_unfit(tokenizer: Any, name: str, task: str) -> None:
    if tokenizer.pad_token is None:
        raise InputError(f"the tokenizer of {name} cannot pad", "it has no padding token", "add one and save it")
    if task == "fill-mask" and tokenizer.mask_token is None:
        raise InputError(
            f"the tokenizer of {name} cannot mask", "it has no mask token", "use the model's own tokenizer"
        )
    if task in ("token-classification", "question-answering") and not tokenizer.is_fast:
        raise InputError(
            f"the tokenizer of {name} does not return offsets of its tokens",
            f"a {type(tokenizer).__name__} is not a fast tokenizer",
            "save it as tokenizer.json",
        )
