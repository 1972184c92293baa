"""Encode rows as tensors, in batches of rows of similar length.

Text here, images in `images`, recordings in `audio`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch.nn import functional as F

from optin_export.data.audio import make_audio_processor
from optin_export.data.images import ImageProcessor as ImageProcessor
from optin_export.data.images import make_image_processor
from optin_export.data.readers import Examples
from optin_export.errors import InputError
from optin_export.models.audio import AudioModel
from optin_export.models.loading import LoadedModel
from optin_export.models.sentence_tokens import adapt_tokenizer, prompt_tokens
from optin_export.models.tasks import ImageModel, Inputs
from optin_export.models.tokenizer import load_tokenizer
from optin_export.recipe import Recipe


@dataclass(frozen=True)
class Batch:
    """Encoded rows of the data. rows: their positions in the examples, from which the order can be restored.

    targets: labels, one per row, if they are made from the data itself (the next token, a masked one).
    """

    inputs: Inputs
    rows: np.ndarray
    targets: Sequence[Any] | None = None


class Processor(Protocol):
    """Encodes rows of one kind of data into the arguments of the task module."""

    def order(self, examples: Examples) -> np.ndarray:
        """Row positions in the order that needs the least padding."""

    def encode(self, examples: Examples, pad_to: int | None = None) -> Inputs:
        """All given rows as one batch; text is padded to `pad_to` tokens, or to its longest row."""

    def targets(self, examples: Examples, inputs: Inputs) -> Sequence[Any] | None:
        """Labels of the rows as encoded in `inputs`; None if the examples' labels apply."""


class TextProcessor:
    """Tokenises `text` (and `text_pair`, as a pair) to at most `sequence` tokens; to exactly that many if `full`.

    longest: limit in tokens, if below `sequence`. prompt: prefix of every text.
    For other tasks see `text`.
    """

    #: Columns to encode, in this order, and how the tokenizer is called.
    columns: tuple[str, ...] = ("text", "text_pair")
    options: ClassVar[dict[str, Any]] = {"truncation": True}

    def __init__(
        self,
        tokenizer: Any,
        sequence: int,
        pairs: bool,
        vocabulary: int | None = None,
        seed: int = 0,
        full: bool = False,
        mask: bool = True,
        longest: int | None = None,
        prompt: str = "",
    ) -> None:
        self.tokenizer, self.sequence, self.vocabulary = tokenizer, sequence, vocabulary
        self.seed, self.full, self.mask = seed, full, mask
        self.whole, self.longest, self.prompt = longest, min(sequence, longest or sequence), prompt
        # Segment ids matter only for pairs; without pairs they would be another input of zeros.
        self.segments = pairs and "token_type_ids" in tokenizer.model_input_names

    def order(self, examples: Examples) -> np.ndarray:
        encoded = self._tokenise(examples)
        return np.argsort([len(ids) for ids in encoded["input_ids"]], kind="stable")

    def encode(self, examples: Examples, pad_to: int | None = None) -> Inputs:
        length = min(self.sequence, pad_to or self.sequence)
        encoded = self._tokenise(examples, max_length=min(length, self.longest), padding="longest", return_tensors="pt")
        highest = int(encoded["input_ids"].max())
        if self.vocabulary is not None and highest >= self.vocabulary:
            raise InputError(
                "the tokenizer does not fit the model",
                f"it returns token {highest}, the model has {self.vocabulary}",
                "set model.tokenizer to the one the model was trained with",
            )
        names = ["input_ids"] + ["attention_mask"] * self.mask + ["token_type_ids"] * self.segments
        more = length - encoded["input_ids"].shape[1] if pad_to or self.full else 0
        types = getattr(self.tokenizer, "pad_token_type_id", 0)
        fill = {"input_ids": self.tokenizer.pad_token_id, "token_type_ids": types}
        return {name: F.pad(encoded[name].to(torch.int64), (0, more), value=fill.get(name, 0)) for name in names}

    def targets(self, examples: Examples, inputs: Inputs) -> Sequence[Any] | None:
        return None

    def lengths(self, examples: Examples) -> list[int]:
        """Tokens of every row, cut only where the model itself cuts."""
        cut = {"truncation": False} if self.whole is None else {"max_length": self.whole}
        return [len(ids) for ids in self._tokenise(examples, verbose=False, **cut)["input_ids"]]

    def _tokenise(self, examples: Examples, **options: Any) -> Any:
        texts = [list(examples.columns[name]) for name in self.columns if name in examples.columns]
        try:
            if self.prompt:
                texts[0] = [self.prompt + text for text in texts[0]]
            return self.tokenizer(*texts, **{"max_length": self.longest, **self.options, **options})
        except Exception as error:  # tokenizers of two languages raise many types
            raise InputError(
                f"the tokenizer cannot encode {' and '.join(self.columns[: len(texts)])}",
                (str(error) or type(error).__name__).splitlines()[0],
                "check the data, model.tokenizer, and that export.sequence is long enough",
            ) from error


def make_processor(
    loaded: LoadedModel,
    recipe: Recipe,
    pairs: bool,
    kind: type[TextProcessor] = TextProcessor,
    tokenizer: Any = None,
) -> Processor:
    """The processor that fits the task, of class `kind` for text; raises InputError if the tokenizer cannot be loaded
    or used. tokenizer: already loaded; None: the recipe's, or the model's own."""
    if isinstance(loaded.model, ImageModel):
        return make_image_processor(loaded, recipe)
    if isinstance(loaded.model, AudioModel):
        return make_audio_processor(loaded, recipe)
    sentence = loaded.sentence
    if tokenizer is None:
        tokenizer = load_tokenizer(recipe.model, loaded.origin, sentence)
    config = getattr(loaded.model.model, "config", None)
    longest = None if sentence is None else adapt_tokenizer(tokenizer, sentence, config)
    positions = _positions(loaded.model.model)
    if positions is not None and recipe.export.sequence > positions:
        raise InputError(
            f"export.sequence is {recipe.export.sequence}", f"the model has {positions} positions", "make it smaller"
        )
    least = tokenizer.num_special_tokens_to_add(pair=pairs) + 1
    if recipe.export.sequence < least:
        raise InputError(
            f"export.sequence is {recipe.export.sequence}",
            "the tokenizer's special tokens leave no space for text",
            f"make it at least {least}",
        )
    mask = getattr(loaded.model, "reads_mask", True)
    # A fixed number of merged tokens needs a fixed length; padding is merged first.
    vocabulary, full = getattr(config, "vocab_size", None), recipe.tokens.merges
    prompt = "" if sentence is None else sentence.prompt
    room = min(recipe.export.sequence, longest or recipe.export.sequence)
    if prompt and prompt_tokens(tokenizer, prompt, None) >= room - 1:
        raise InputError(
            f"the prompt of {recipe.model.source} leaves no space for text",
            f"a text is cut at {room} tokens, the prompt has almost as many",
            "make export.sequence larger",
        )
    return kind(tokenizer, recipe.export.sequence, pairs, vocabulary, recipe.seed, full, mask, longest, prompt)


def _positions(model: torch.nn.Module) -> int | None:
    """The longest sequence that the model has positions for, if it is limited."""
    positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if isinstance(positions, int) and positions <= 0:  # no limit, as in XLNet
        positions = None
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            # RoBERTa-like models count positions from the padding token's number plus one.
            return len(module.weight) - module.padding_idx - 1
    return positions


def batches(processor: Processor, examples: Examples, size: int, targets: bool = False) -> Iterator[Batch]:
    """Batches of `size` rows of similar length; the last may be smaller. targets: include the processor's targets."""
    order = processor.order(examples)
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        chosen = examples.take(rows)
        inputs = processor.encode(chosen)
        yield Batch(inputs, rows, processor.targets(chosen, inputs) if targets else None)
