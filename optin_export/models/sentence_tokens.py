"""Use a tokenizer as sentence-transformers does: length limit, lowercasing, and the length of a prompt."""

from __future__ import annotations

from typing import Any

from optin_export.errors import InputError
from optin_export.sentence import SentenceFolder


def adapt_tokenizer(tokenizer: Any, folder: SentenceFolder, config: Any) -> int | None:
    """Make the tokenizer of `folder` lowercase as the folder says; how many tokens a text is cut at, None: never.

    config: the transformer's. Raises InputError for a tokenizer that would be used in another way.
    """
    if not folder.listed and getattr(tokenizer, "chat_template", None):
        raise InputError(
            f"{folder.source} cannot be used as a CrossEncoder",
            "its tokenizer has a chat template, which sentence-transformers applies to every pair",
            "use another model",
        )
    if folder.lower:
        _lowercase(tokenizer, folder.source)
    longest = folder.max_length
    if longest is None:
        positions = getattr(config, "max_position_embeddings", None)
        # -1: XLNet's way to say that there is no limit.
        limits = [tokenizer.model_max_length, *([positions] if isinstance(positions, int) and positions != -1 else [])]
        longest = int(min(limits))
    return longest if longest < 10**9 else None


def _lowercase(tokenizer: Any, source: str) -> None:
    from tokenizers import normalizers

    if not tokenizer.is_fast:
        raise InputError(
            f"the tokenizer of {source} cannot be set to lowercase",
            f"do_lower_case is set, and a {type(tokenizer).__name__} is not a fast tokenizer",
            "save it as tokenizer.json",
        )
    found: Any = tokenizer.backend_tokenizer.normalizer
    several = isinstance(found, normalizers.Sequence)
    parts = list(found) if several else [] if found is None else [found]
    if not any(isinstance(part, normalizers.Lowercase) for part in parts):
        tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), *parts])


def prompt_tokens(tokenizer: Any, prompt: str, longest: int | None) -> int:
    """Tokens at the start of every encoded text that are the prompt's, counted as sentence-transformers does."""
    cut = {} if longest is None else {"truncation": True, "max_length": longest}
    ids = tokenizer(prompt, **cut)["input_ids"]
    return len(ids) - (bool(ids) and ids[-1] in tokenizer.all_special_ids)
