"""From rows to tensors: tokenising and image preprocessing, in batches of rows of similar length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch.nn import functional as F

from optin_export.errors import InputError
from optin_export.recipe import ModelSection, Recipe
from optin_export.sources.data import IMAGE_FORMATS, Examples
from optin_export.sources.models import LoadedModel
from optin_export.sources.sentence_tokens import adapt_tokenizer, prompt_tokens
from optin_export.sources.tasks import ImageModel, SegmentationModel
from optin_export.sources.tokenizer import load_tokenizer

#: Task inputs by argument name, each a tensor whose first dimension is the batch.
Inputs = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Batch:
    """Some rows of the data, encoded. rows: their positions in the examples, so that an order can be undone.

    targets: labels, one per row, where they are made from the data itself (the next token, a masked one).
    """

    inputs: Inputs
    rows: np.ndarray
    targets: Sequence[Any] | None = None


class Processor(Protocol):
    """Encodes rows of one kind of data into the arguments of the task module."""

    def order(self, examples: Examples) -> np.ndarray:
        """Row positions in the order that wastes least padding."""

    def encode(self, examples: Examples, pad_to: int | None = None) -> Inputs:
        """All given rows as one batch; text is padded to `pad_to` tokens, or to its longest row."""

    def targets(self, examples: Examples, inputs: Inputs) -> Sequence[Any] | None:
        """Labels of the rows as they are encoded in `inputs`; None where they are those of the examples."""


class TextProcessor:
    """Tokenises `text` (and `text_pair`, as a pair) to at most `sequence` tokens; always to as many if `full`.

    longest: tokens at which a text is cut although `sequence` has room for more. prompt: put before every text.
    Further tasks: see `text`.
    """

    #: Columns that are encoded, in this order, and how the tokenizer is called.
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
        # Segment ids only say something about pairs; without pairs they would be one more input of zeros.
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
                f"it gives token {highest}, the model has {self.vocabulary}",
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
                "check the data, model.tokenizer, and that export.sequence leaves room",
            ) from error


class ImageProcessor:
    """Resizes and normalises images to [batch, channels, H, W] float32.

    Arrays (uint8 [N, H, W] or [N, H, W, C], or float [N, C, H, W] that is left as it is) are stretched to the input
    size; image files go through timm's evaluation transform for the checkpoint.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config
        channels, height, width = config["input_size"]
        self.channels, self.size = channels, (height, width)
        self.mean = torch.tensor(config["mean"], dtype=torch.float32).view(1, -1, 1, 1)
        self.std = torch.tensor(config["std"], dtype=torch.float32).view(1, -1, 1, 1)

    def order(self, examples: Examples) -> np.ndarray:
        return np.arange(len(examples))

    def targets(self, examples: Examples, inputs: Inputs) -> Sequence[Any] | None:
        return None

    def encode(self, examples: Examples, pad_to: int | None = None) -> Inputs:
        images = examples.columns["image"]
        pixels = self._from_array(images) if isinstance(images, np.ndarray) else self._from_files(list(images))
        return {"pixel_values": pixels}

    def _from_array(self, images: np.ndarray) -> torch.Tensor:
        if 0 in images.shape or images.ndim not in ((3, 4) if images.dtype == np.uint8 else (4,)):
            raise InputError(
                "the array of images has a wrong shape",
                f"one row is {images.dtype} {list(images.shape[1:])}",
                "give uint8 [N, H, W] or [N, H, W, C], or float [N, C, H, W]",
            )
        channels = images.shape[1] if images.dtype != np.uint8 else images.shape[3] if images.ndim == 4 else 1
        if channels != self.channels:  # before normalising, which would stretch one channel to all
            raise InputError(
                "the images do not fit the model",
                f"they have {channels} channel(s), the model takes {self.channels}",
                "convert the images, or set the model's channels in model.args",
            )
        if images.dtype != np.uint8:
            pixels = torch.from_numpy(np.ascontiguousarray(images, dtype=np.float32))
        else:
            planes = images[..., None] if images.ndim == 3 else images
            pixels = torch.from_numpy(np.ascontiguousarray(planes)).permute(0, 3, 1, 2).float() / 255
            if pixels.shape[-2:] != self.size:
                smooth = {} if self.config["interpolation"] == "nearest" else {"align_corners": False}
                mode = self.config["interpolation"]
                pixels = torch.nn.functional.interpolate(pixels, self.size, mode=mode, **smooth)
            pixels = (pixels - self.mean) / self.std
        if pixels.shape[1:] != (self.channels, *self.size):
            raise InputError(
                "the images do not fit the model",
                f"an image is {tuple(pixels.shape[1:])}, the model takes {(self.channels, *self.size)}",
                "set model.preprocess.size, or model.args, to match",
            )
        return pixels.contiguous()

    def _from_files(self, paths: list[Any]) -> torch.Tensor:
        from PIL import Image
        from timm.data import create_transform

        transform = create_transform(**self.config, is_training=False)
        mode = "L" if self.channels == 1 else "RGB"
        pixels = []
        for path in paths:
            try:
                image = Image.open(path, formats=IMAGE_FORMATS) if isinstance(path, Path) else path
                pixels.append(transform(image.convert(mode)))
            except Exception as error:  # damaged, gigantic or no images at all: as many types as formats
                name = path if isinstance(path, Path) else f"given as a {type(path).__name__}"
                raise InputError(
                    f"cannot read the image {name}", f"{type(error).__name__}: {error}", "remove or repair it"
                ) from None
        return torch.stack(pixels)


def make_processor(
    loaded: LoadedModel, recipe: Recipe, pairs: bool, kind: type[TextProcessor] = TextProcessor
) -> Processor:
    """The processor that fits the task, of class `kind` for text; raises InputError when the tokenizer cannot be loaded
    or does not serve."""
    if isinstance(loaded.model, ImageModel):
        return ImageProcessor(_image_config(loaded, recipe.model))
    sentence = loaded.sentence
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
            "the tokenizer's own marks leave no room for text",
            f"make it at least {least}",
        )
    mask = getattr(loaded.model, "reads_mask", True)
    # A fixed number of merged tokens needs a fixed length; padding is what leaves first.
    vocabulary, full = getattr(config, "vocab_size", None), recipe.tokens.merges
    prompt = "" if sentence is None else sentence.prompt
    room = min(recipe.export.sequence, longest or recipe.export.sequence)
    if prompt and prompt_tokens(tokenizer, prompt, None) >= room - 1:
        raise InputError(
            f"the prompt of {recipe.model.source} leaves no room for text",
            f"a text is cut at {room} tokens, the prompt has nearly as many",
            "make export.sequence larger",
        )
    return kind(tokenizer, recipe.export.sequence, pairs, vocabulary, recipe.seed, full, mask, longest, prompt)


def _positions(model: torch.nn.Module) -> int | None:
    """The longest sequence that the model has positions for, if it is limited."""
    positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            # RoBERTa and its like count from behind the padding token's number.
            return len(module.weight) - module.padding_idx - 1
    return positions


def _image_config(loaded: LoadedModel, section: ModelSection) -> dict[str, Any]:
    """timm's data configuration: the checkpoint's own, overridden field by field by the recipe's `preprocess`."""
    from timm.data import resolve_model_data_config

    module = loaded.model.model
    if hasattr(module, "pretrained_cfg"):
        config = resolve_model_data_config(module)
    else:
        config = _transformers_image_config(loaded, section)
    if isinstance(loaded.model, SegmentationModel):  # the label maps are of the whole image
        config |= {"crop_pct": 1.0, "crop_mode": "squash"}
    wanted = section.preprocess
    channels = _input_channels(module, config["input_size"][0])
    config["input_size"] = (channels, *(wanted.size or config["input_size"][1:]))
    for name in ("mean", "std", "interpolation"):
        if getattr(wanted, name) is not None:
            config[name] = getattr(wanted, name)
    for name in ("mean", "std"):
        values = tuple(config[name])
        if len(values) not in (1, channels):
            # A checkpoint configured for RGB with a first layer of another width: its statistics do not apply.
            raise InputError(
                f"preprocess.{name} has {len(values)} values", f"the model takes {channels} channels", f"set {name}"
            )
        config[name] = values * channels if len(values) == 1 else values
    return config


def _transformers_image_config(loaded: LoadedModel, section: ModelSection) -> dict[str, Any]:
    """Size, crop and statistics of a transformers image processor; without one, stretched to the model's size."""
    import transformers

    config = getattr(loaded.model.model, "config", None)
    config = getattr(config, "vision_config", config)
    size = getattr(config, "image_size", 224)
    height, width = (size, size) if isinstance(size, int) else size
    result: dict[str, Any] = {
        "input_size": (getattr(config, "num_channels", 3), height, width),
        "interpolation": "bilinear",
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "crop_pct": 1.0,
        "crop_mode": "squash",
    }
    if loaded.origin is None:  # the user's own model: no folder, and no hub name to ask for
        return result
    try:
        # Said outright: left open, the library asks at the terminal whether it may run code.
        processor = transformers.AutoImageProcessor.from_pretrained(
            loaded.origin, trust_remote_code=section.trust_remote_code
        )
        result |= {"mean": tuple(processor.image_mean), "std": tuple(processor.image_std), **_crop(processor)}
        if not hasattr(config, "image_size"):  # a model of any size: the one it was trained for
            sizes = (processor.size["height"], processor.size["width"])
            result["input_size"] = (result["input_size"][0], *sizes)
        return result
    except Exception:  # random weights and bare folders bring none: the library's own defaults stand
        return result


def _crop(processor: Any) -> dict[str, Any]:
    """How it comes from an image to the model's size, in timm's words."""
    names = {0: "nearest", 2: "bilinear", 3: "bicubic"}  # PIL's
    found: dict[str, Any] = {"interpolation": names.get(int(processor.resample), "bilinear")}
    size = dict(processor.size)
    if getattr(processor, "do_center_crop", False):
        resized = size.get("shortest_edge") or size["height"]
        # A little more than that: timm divides by it again and rounds down.
        found |= {"crop_pct": dict(processor.crop_size)["height"] / (resized + 1e-6)}
        found |= {"crop_mode": "center" if size.get("shortest_edge") else "squash"}
    return found


def _input_channels(module: torch.nn.Module, default: int) -> int:
    first = next((part for part in module.modules() if isinstance(part, torch.nn.Conv2d)), None)
    return first.in_channels if first is not None else default


def batches(processor: Processor, examples: Examples, size: int, targets: bool = False) -> Iterator[Batch]:
    """Batches of `size` rows of similar length; the last may be smaller. targets: with those of the processor."""
    order = processor.order(examples)
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        chosen = examples.take(rows)
        inputs = processor.encode(chosen)
        yield Batch(inputs, rows, processor.targets(chosen, inputs) if targets else None)
