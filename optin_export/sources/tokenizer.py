"""The tokenizer that belongs to a model."""

from __future__ import annotations

from typing import Any

from optin_export.errors import InputError
from optin_export.recipe import ModelSection


def load_tokenizer(section: ModelSection, origin: str | None) -> Any:
    """`model.tokenizer`, or what lies with the model; raises InputError where it cannot be loaded or cannot pad."""
    import transformers

    name = section.tokenizer or origin
    if name is None:
        raise InputError("the model has no tokenizer", "its source brings none", "set model.tokenizer to a folder")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=section.trust_remote_code)
    except Exception as error:  # missing files, broken JSON and network errors come as many types
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"cannot load the tokenizer of {name}", reason, "set model.tokenizer to a folder") from error
    if tokenizer.pad_token is None:
        raise InputError(f"the tokenizer of {name} cannot pad", "it has no padding token", "give it one and save it")
    return tokenizer
