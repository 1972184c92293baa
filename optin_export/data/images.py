"""Prepare images as a model's input, as the model's library prepares them for evaluation.

The library's own code makes the pixels: timm's evaluation transform, or transformers' image processor. `config` holds
equivalent steps for a server that has neither, and `pixels` executes them. Both open an image in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from optin_export.data import pixels
from optin_export.data.hub_images import HubImages, load_hub_images
from optin_export.data.readers import Examples
from optin_export.errors import InputError
from optin_export.models.loading import LoadedModel
from optin_export.models.tasks import SegmentationModel
from optin_export.recipe import Recipe
from optin_export.recipe.model import Preprocess
from optin_export.workdir.opening import regular

#: A Pillow image in the mode that `pixels.open_image` gives, to float32 [C, H, W].
Library = Callable[[Any], torch.Tensor]
#: Keys of timm's data configuration.
_TIMM = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")


class ImageProcessor:
    """Prepares images as [batch, channels, H, W] float32.

    Image files, Pillow images and uint8 arrays [N, H, W] or [N, H, W, C] of another size than the model's go through
    the library's steps. A uint8 array of the model's size is only scaled and normalised, a float array [N, C, H, W] is
    left as it is.

    config: see `pixels`. library: makes the pixels of an opened image; without it, timm's evaluation transform with
    timm's configuration does. whole: the images have label maps, so images that would be rotated are refused. notes:
    warnings for the user. reduces_labels: 0 in a label map means "not evaluated", and classes count from 1.
    """

    def __init__(
        self,
        config: dict[str, Any],
        library: Library | None = None,
        whole: bool = False,
        notes: Sequence[str] = (),
        reduces_labels: bool = False,
    ) -> None:
        self.config, self.whole, self.reduces_labels = dict(config), whole, reduces_labels
        self._notes, self._prepares = tuple(notes), False
        self.library = library or _timm_transform(self.config)

    @property
    def channels(self) -> int:
        return int(self.config["input_size"][0])

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width of the model's input; None until the first image determines it."""
        _, height, width = self.config["input_size"]
        return None if height is None else (int(height), int(width))

    @property
    def notes(self) -> tuple[str, ...]:
        """Warnings for the user; empty if all images are float arrays, which are not preprocessed."""
        return self._notes if self._prepares else ()

    def order(self, examples: Examples) -> np.ndarray:
        return np.arange(len(examples))

    def targets(self, examples: Examples, inputs: dict[str, torch.Tensor]) -> Sequence[Any] | None:
        return None

    def encode(self, examples: Examples, pad_to: int | None = None) -> dict[str, torch.Tensor]:
        images = examples.columns["image"]
        made = self._from_array(images) if isinstance(images, np.ndarray) else self._from_files(list(images))
        return {"pixel_values": made}

    def check(self, examples: Examples) -> None:
        """Read the header of every image; raises InputError for one that cannot be read or does not fit.

        If the size of the result depends on the image, the first image sets it for all.
        """
        images = examples.columns["image"]
        self._prepares |= not isinstance(images, np.ndarray) or images.dtype == np.uint8
        if isinstance(images, np.ndarray):
            return
        known: dict[tuple[int, int], tuple[int, int]] = {}
        for image in images:
            with _Reading(image):
                opened = pixels.header(image)
                size = pixels.check_header(opened, self.config)
                if self.config.get("refused"):  # only the library knows
                    if size not in known:
                        blank = np.zeros((*size, self.channels), np.uint8)
                        known[size] = tuple(self.library(_picture(blank)).shape[1:])  # type: ignore[assignment]
                    size = known[size]
                if isinstance(image, Path):
                    opened.close()
            self._agree(size, image)

    def _agree(self, size: tuple[int, int], image: Any) -> None:
        if self.size is None:
            self.config["input_size"] = (self.channels, *size)
        elif self.size != tuple(size):
            raise InputError(
                "the images have different sizes after preprocessing",
                f"{_name(image)} becomes {size[0]} x {size[1]}, others {self.size[0]} x {self.size[1]}, and an engine "
                "takes one size",
                "set model.preprocess.size: [height, width]",
            )

    def _from_array(self, images: np.ndarray) -> torch.Tensor:
        if 0 in images.shape or images.ndim not in ((3, 4) if images.dtype == np.uint8 else (4,)):
            raise InputError(
                "the array of images has a wrong shape",
                f"one row is {images.dtype} {list(images.shape[1:])}",
                "give uint8 [N, H, W] or [N, H, W, C], or float [N, C, H, W]",
            )
        channels = images.shape[1] if images.dtype != np.uint8 else images.shape[3] if images.ndim == 4 else 1
        if channels != self.channels:  # before normalising, which would broadcast one channel to all
            raise InputError(
                "the images do not fit the model",
                f"they have {channels} channel(s), the model takes {self.channels}",
                "convert the images, or set the model's channels in model.args",
            )
        if images.dtype != np.uint8:
            made = torch.from_numpy(np.ascontiguousarray(images, dtype=np.float32))
            if self.size is None:
                self.config["input_size"] = (self.channels, *made.shape[2:])
        else:
            planes = images[..., None] if images.ndim == 3 else images
            if self.size == planes.shape[1:3] and "mean" in self.config:
                made = torch.from_numpy(pixels.values(planes, self.config))
            else:
                made = torch.stack([self._one(plane) for plane in planes])
        if self.size is None or made.shape[1:] != (self.channels, *self.size):
            raise InputError(
                "the images do not fit the model",
                f"an image is {tuple(made.shape[1:])}, the model takes {(self.channels, *(self.size or ()))}",
                "set model.preprocess.size, or model.args, to match",
            )
        return made.contiguous()

    def _one(self, plane: np.ndarray) -> torch.Tensor:
        """A row of an array: through the library if Pillow supports its number of channels."""
        with _Reading(plane):
            if self.channels in pixels.MODES:
                made = self.library(pixels.open_image(plane, self.config))
            else:
                pixels.check_sizes(self.config, plane.shape[1], plane.shape[0])
                made = torch.from_numpy(pixels.apply(plane, self.config))
        self._agree((made.shape[1], made.shape[2]), plane)
        return made

    def _from_files(self, images: list[Any]) -> torch.Tensor:
        made = []
        for image in images:
            with _Reading(image):
                made.append(self.library(pixels.open_image(image, self.config, whole=self.whole)))
            self._agree((made[-1].shape[1], made[-1].shape[2]), image)
        return torch.stack(made)


class _Reading:
    """Turn every error raised while an image is read into an InputError that names the image."""

    def __init__(self, image: Any) -> None:
        self.image = image

    def __enter__(self) -> None:
        if isinstance(self.image, Path):  # a FIFO without a writer would block
            try:
                regular(self.image)
            except OSError as error:
                self.__exit__(type(error), error, None)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, pixels.WrongChannels):
            raise InputError(
                "the images do not fit the model",
                f"{_name(self.image)}: {error}",
                "convert the images, or give arrays [N, H, W, C] of the model's channels",
            ) from None
        if isinstance(error, Exception):  # damaged, huge or not an image: each format raises its own types
            raise InputError(
                f"cannot read the image {_name(self.image)}", f"{type(error).__name__}: {error}", "remove or repair it"
            ) from None


def _name(image: Any) -> str:
    return str(image) if isinstance(image, str | Path) else f"given as a {type(image).__name__}"


def _picture(array: np.ndarray) -> Any:
    from PIL import Image

    return Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)


def _timm_transform(config: dict[str, Any]) -> Library:
    from timm.data import create_transform

    if "steps" in config:
        return partial(_own_steps, config)
    made: Library = create_transform(**{name: config[name] for name in _TIMM if name in config}, is_training=False)
    return made


def _own_steps(config: dict[str, Any], image: Any) -> torch.Tensor:
    return torch.from_numpy(pixels.apply(pixels.array_of(image), config))


def make_image_processor(loaded: LoadedModel, recipe: Recipe) -> ImageProcessor:
    """The processor of the model's library, with the recipe's `model.preprocess` on top.

    Raises InputError if it cannot be used, or if `ship.ensemble` needs it in the server and it cannot be served.
    """
    segments = isinstance(loaded.model, SegmentationModel)
    module, wanted = loaded.model.model, recipe.model.preprocess
    maps = segments and recipe.data.evaluation is not None
    hub: HubImages | None = None
    if hasattr(module, "pretrained_cfg"):
        from timm.data import resolve_model_data_config

        defaults = resolve_model_data_config(module)
        size = wanted.size or defaults["input_size"][1:]
        config = _with_recipe(defaults, wanted, segments, _channels(module, size))
        config["upright"] = False  # timm does not rotate images
        made = ImageProcessor(config, whole=maps)
    else:
        if loaded.origin is not None:
            hub = load_hub_images(loaded.origin, recipe.model, _hub_channels(module, wanted.size), segments)
        if hub is None or hub.timm is not None:
            found = _bare(module, wanted.size) if hub is None or hub.timm is None else hub.timm
            config = _with_recipe(found, wanted, segments, _hub_channels(module, wanted.size))
            config["upright"] = loaded.architecture["library"] == "transformers"
            made = ImageProcessor(config, whole=maps, notes=_notes(loaded, config, wanted) if hub is None else ())
        else:
            made = ImageProcessor(hub.config, hub.pixels, maps, hub.notes, hub.reduces_labels)
    refused = made.config.get("refused")
    if maps and (refused or not pixels.keeps_the_whole(made.config)):
        raise InputError(
            "the label maps do not fit the model's input",
            refused or "the image processor crops or pads the images, and a label map is of the whole image",
            "set model.preprocess.size: [height, width], which stretches the whole image to that size",
        )
    if recipe.ship.ensemble and refused:
        raise InputError(
            "ship.ensemble cannot preprocess these images", refused, "set ship.ensemble: false, and send pixels"
        )
    return made


def _with_recipe(config: dict[str, Any], wanted: Preprocess, segments: bool, channels: int | None) -> dict[str, Any]:
    """timm's data configuration, overridden field by field by the recipe's `preprocess`."""
    config = dict(config)
    if segments:  # the label maps cover the whole image
        config |= {"crop_pct": 1.0, "crop_mode": "squash"}
    channels = channels or config["input_size"][0]
    config["input_size"] = (channels, *(wanted.size or config["input_size"][1:]))
    for name in ("mean", "std", "interpolation"):
        if getattr(wanted, name) is not None:
            config[name] = getattr(wanted, name)
    for name in ("mean", "std"):
        statistics = tuple(config[name])
        if len(statistics) not in (1, channels):
            # A checkpoint configured for RGB with a first layer of another width: its statistics do not apply.
            raise InputError(
                f"preprocess.{name} has {len(statistics)} values", f"the model takes {channels} channels", f"set {name}"
            )
        config[name] = statistics * channels if len(statistics) == 1 else statistics
    if config["interpolation"] == "random":
        raise InputError(
            "the checkpoint's images are resized with a random filter",
            "its interpolation is 'random', so an evaluation would not be repeatable",
            "set model.preprocess.interpolation",
        )
    return config


def _bare(module: torch.nn.Module, wanted: Sequence[int] | None) -> dict[str, Any]:
    """Without an image configuration: the whole image stretched to the model's size, values in -1..1."""
    config = getattr(module, "config", None)
    config = getattr(config, "vision_config", config)
    size = getattr(config, "image_size", None) or 224
    height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    return {
        "input_size": (_channels(module, wanted or (height, width)) or 3, height, width),
        "interpolation": "bilinear",
        "mean": (0.5,),
        "std": (0.5,),
        "crop_pct": 1.0,
        "crop_mode": "squash",
    }


def _notes(loaded: LoadedModel, config: dict[str, Any], wanted: Preprocess) -> tuple[str, ...]:
    if None not in (wanted.size, wanted.mean, wanted.std, wanted.interpolation):
        return ()
    _, height, width = config["input_size"]
    mean, std = (", ".join(f"{value:g}" for value in sorted(set(config[name]))) for name in ("mean", "std"))
    where = (
        f"{loaded.origin} has no preprocessor_config.json" if loaded.origin else "the model says nothing of its images"
    )
    return (
        f"{where}: images are stretched to {height} x {width} ({config['interpolation']}), mean {mean}, std {std}; "
        "set all fields of model.preprocess if it was trained otherwise",
    )


def _channels(module: torch.nn.Module, size: Sequence[int]) -> int | None:
    """Channels of the images, by the first convolution; None without one.

    Some models rearrange the pixels first, e.g. squares of 4 x 4 pixels into 48 channels: of unusual numbers, the model
    is asked with an image of `size`.
    """
    first = next((part for part in module.modules() if isinstance(part, torch.nn.Conv2d)), None)
    if first is None or first.in_channels in (1, 3):
        return None if first is None else first.in_channels
    for channels in (first.in_channels, 3, 1):
        try:
            with torch.no_grad():
                module(torch.zeros(1, channels, *size, device=first.weight.device, dtype=first.weight.dtype))
        except Exception:  # whatever its code says to images of another shape
            continue
        return channels
    return first.in_channels


def _hub_channels(module: torch.nn.Module, size: Sequence[int] | None) -> int:
    """Channels by the configuration; the first convolution of some models does not read the image directly."""
    config = getattr(module, "config", None)
    config = getattr(config, "vision_config", config)
    given = getattr(config, "num_channels", None)
    return given if isinstance(given, int) else _channels(module, size or (224, 224)) or 3
