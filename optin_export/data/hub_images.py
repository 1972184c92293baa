"""transformers' image processors: loaded as `AutoImageProcessor` does, overridden by the recipe, and translated.

The processor itself makes the pixels of calibration and evaluation. A server does not have transformers, so equivalent
steps are derived from the processor's fields, and used only if they make the same pixels from images of several shapes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from optin_export.data import pixels
from optin_export.data.hub_steps import Candidate, candidates
from optin_export.errors import InputError
from optin_export.recipe import ModelSection
from optin_export.recipe.model import Preprocess

_FILES = ("preprocessor_config.json", "processor_config.json")
#: Largest and mean difference of the served pixels from the library's, in levels of 0..255. torchvision and Pillow
#: round what they resize differently: by up to 2 levels, in few pixels.
MOST_LEVELS, MEAN_LEVELS = 2.01, 0.3
#: Height and width of the images that are compared, as shares of the result's height and width; the cheapest first.
_SHAPES = ((0.61, 0.87), (1.0, 1.0), (2.13, 0.79), (1.37, 1.93))
_LARGEST_PROBE = 1600


@dataclass
class HubImages:
    """An image processor of transformers as the recipe wants it.

    config: see `pixels`; it holds `refused` if no steps were found. timm: timm's data configuration, for a timm
    checkpoint. notes: warnings for the user.
    """

    processor: Any
    channels: int
    config: dict[str, Any] = field(default_factory=dict)
    timm: dict[str, Any] | None = None
    notes: Sequence[str] = ()

    @property
    def reduces_labels(self) -> bool:
        """0 in a label map means "not evaluated", and classes count from 1."""
        return bool(getattr(self.processor, "do_reduce_labels", False))

    @property
    def name(self) -> str:
        return type(self.processor).__name__

    def pixels(self, image: Any) -> torch.Tensor:
        """float32 [C, H, W] of a single opened image, because some processors pad a batch to its largest image."""
        result = self.processor(images=image, return_tensors="pt")
        made = result.get("pixel_values")
        shape = None if made is None else tuple(getattr(made, "shape", ()))
        if shape is None or len(shape) != 4 or shape[0] != 1:
            given = f"pixel_values of shape {list(shape)}" if shape is not None else ", ".join(result)
            raise InputError(
                f"the images of {self.name} cannot be used",
                f"it gives {given}, and the model is exported with one image [channels, height, width] per row",
                "use a model with such an image processor",
            )
        return torch.as_tensor(made)[0].float()


def load_hub_images(origin: str, section: ModelSection, channels: int, segments: bool) -> HubImages | None:
    """The processor of a folder or a hub model; None if it has no processor file.

    channels: number of channels that the model takes. segments: the images may have label maps. Raises InputError for a
    file that cannot be used and for fields of `model.preprocess` that the processor does not support.
    """
    made = _load(origin, section, None)
    if made is None:
        return None
    hub = HubImages(made, channels)
    if hasattr(made, "data_config"):
        hub.timm = dict(made.data_config)
        return hub
    _override(hub, section.preprocess, segments)
    probes = _probes(hub)
    if not probes and getattr(made, "backend", "") == "torchvision":
        # What torch cannot resample (box, hamming) Pillow can, which is the library's other backend.
        second = HubImages(_load(origin, section, "pil"), channels)
        _override(second, section.preprocess, segments)
        probes = _probes(second)
        if probes:
            note = f"torchvision cannot do what {hub.name} asks for: its Pillow backend prepares the images"
            hub = HubImages(second.processor, channels, notes=(note,))
    if not probes:
        raise _unusable(hub)
    _translate(hub, section.preprocess, probes)
    return hub


def _unusable(hub: HubImages) -> InputError:
    """The reason why the processor cannot process any image."""
    if hub.channels not in pixels.MODES:
        return InputError(
            f"the images of {hub.name} cannot be used",
            f"the model takes {hub.channels} channels, and image files give 1, 3 or 4",
            "give float arrays [N, C, H, W] to a model without preprocessor_config.json",
        )
    try:
        hub.pixels(_picture(_noise(64, 96, hub.channels)))
        why = "it takes no image of another size than 96 x 64"
    except Exception as error:  # whatever the processor raises is the reason
        why = f"{type(error).__name__}: {error}"
    return InputError(f"{hub.name} cannot preprocess an image", why[:300], "correct preprocessor_config.json")


def _load(origin: str, section: ModelSection, backend: str | None) -> Any:
    import transformers

    options = {} if backend is None else {"backend": backend}
    try:
        # Explicit: with the default, the library asks at the terminal whether it may run code.
        return transformers.AutoImageProcessor.from_pretrained(
            origin, trust_remote_code=section.trust_remote_code, **options
        )
    except Exception as error:  # missing and damaged files, unknown names, a hub that does not answer
        if not _has_file(origin):
            return None
        lines = str(error).strip().splitlines() or [""]
        raise InputError(
            f"cannot load the image processor of {origin}",
            f"{type(error).__name__}: {lines[0]}",
            "correct its preprocessor_config.json; without that file, model.preprocess defines the preprocessing",
        ) from error


def _has_file(origin: str) -> bool:
    """Whether there is an image configuration; true as well if that cannot be determined."""
    if Path(origin).is_dir():
        return any((Path(origin) / name).is_file() for name in _FILES[:1]) or _nested(Path(origin) / _FILES[1])
    from transformers.models.auto.image_processing_auto import get_image_processor_config

    try:
        return bool(get_image_processor_config(origin))
    except Exception:  # the error that is raised is the one of loading it
        return True


def _nested(path: Path) -> bool:
    """Whether a processor_config.json configures images; true as well for a file that cannot be read."""
    return path.is_file() and '"image_processor"' in path.read_text(encoding="utf-8", errors="replace")


def _override(hub: HubImages, wanted: Preprocess, segments: bool) -> None:
    """The recipe's `preprocess`, as fields of the processor."""
    from PIL import Image

    processor = hub.processor
    if hub.channels != 3 and getattr(processor, "do_convert_rgb", None):
        processor.do_convert_rgb = False  # the images are opened with the model's own channels
    if wanted.size is not None:
        _resize_to(processor, wanted.size, segments)
    if wanted.interpolation is not None:
        processor.resample = Image.Resampling[wanted.interpolation.upper()]
    if wanted.mean is not None or wanted.std is not None:
        factor = getattr(processor, "rescale_factor", None) or 0.0
        offset = getattr(processor, "rescale_offset", False)
        if not getattr(processor, "do_rescale", False) or abs(factor * 255 - 1) > 1e-6 or offset:
            raise InputError(
                "model.preprocess.mean and std do not fit the image processor",
                f"they are for pixels in 0..1, and {hub.name} does not scale to that range",
                "leave them out, or correct preprocessor_config.json",
            )
        processor.do_normalize = True
    for name in ("mean", "std"):
        given = getattr(wanted, name)
        used = given if given is not None else getattr(processor, f"image_{name}", None)
        if isinstance(used, float | int) or used is None:
            continue
        if len(used) not in (1, hub.channels) and getattr(processor, "do_normalize", False):
            raise InputError(
                f"preprocess.{name} has {len(used)} values", f"the model takes {hub.channels} channels", f"set {name}"
            )
        setattr(processor, f"image_{name}", tuple(used) * hub.channels if len(used) == 1 else tuple(used))


def _resize_to(processor: Any, wanted: tuple[int, int], whole: bool) -> None:
    """Make every image `wanted`: with the share that the processor crops, or stretched if `whole`."""
    height, width = wanted
    size, crop = read_size(processor, "size"), read_size(processor, "crop_size")
    processor.do_resize = True
    for name, value in (("size_divisor", 1), ("ensure_multiple_of", 1), ("keep_aspect_ratio", False)):
        if getattr(processor, name, None) is not None:
            setattr(processor, name, value)
    if read_size(processor, "pad_size"):
        processor.pad_size = {"height": height, "width": width}
    exact = {"height": height, "width": width}
    if whole:
        processor.do_center_crop = False
        processor.size = exact
    elif getattr(processor, "do_center_crop", False) and crop and "PerceiverImage" not in type(processor).__name__:
        share = max(height / crop["height"], width / crop["width"])
        if "shortest_edge" in size:
            processor.size = {"shortest_edge": round(size["shortest_edge"] * share)}
        elif "height" in size:
            down, across = height / crop["height"], width / crop["width"]
            processor.size = {"height": round(size["height"] * down), "width": round(size["width"] * across)}
        processor.crop_size = exact
    elif "crop_pct" in dir(processor) and "shortest_edge" in size and height == width:
        processor.size = {"shortest_edge": height}
    else:
        if "PerceiverImage" in type(processor).__name__ and crop and "height" in size:
            processor.crop_size = {name: round(crop[name] * exact[name] / size[name]) for name in exact}
        processor.size = exact


def read_size(processor: Any, name: str) -> dict[str, int]:
    """The fields of a size that have a value."""
    given = getattr(processor, name, None)
    fields = ("height", "width", "shortest_edge", "longest_edge", "max_height", "max_width")
    if isinstance(given, int):
        return {"height": given, "width": given}
    found = {key: given.get(key) if isinstance(given, dict) else getattr(given, key, None) for key in fields}
    return {key: int(value) for key, value in found.items() if value}


def _noise(height: int, width: int, channels: int) -> np.ndarray:
    return np.random.default_rng(height * 10_007 + width).integers(0, 256, (height, width, channels), dtype=np.uint8)


def _picture(array: np.ndarray) -> Any:
    from PIL import Image

    return Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)


def _probes(hub: HubImages) -> list[tuple[np.ndarray, torch.Tensor]]:
    """Noise images in several shapes with the pixels that the processor makes, without images on which it fails."""
    if hub.channels not in pixels.MODES:
        return []
    made: list[tuple[np.ndarray, torch.Tensor]] = []
    first = _noise(96, 144, hub.channels)
    try:
        size = tuple(hub.pixels(_picture(first)).shape[1:])
    except InputError:
        raise
    except Exception:  # too small for a crop, or not supported by this backend: the other images decide
        size = (64, 64)
    for shares in _SHAPES:
        height, width = (
            min(max(round(share * side), 8), _LARGEST_PROBE) for share, side in zip(shares, size, strict=True)
        )
        image = _noise(height, width, hub.channels)
        try:
            made.append((image, hub.pixels(_picture(image))))
        except InputError:
            raise
        except Exception:  # the images it accepts decide; if it accepts none, the caller raises the reason
            continue
    return made


def _translate(hub: HubImages, wanted: Preprocess, probes: Sequence[tuple[np.ndarray, torch.Tensor]]) -> None:
    """Set `hub.config` to steps that make the processor's pixels, or to the reason why no steps do."""
    shapes = {tuple(result.shape) for _, result in probes}
    channels = {shape[0] for shape in shapes}
    if channels != {hub.channels}:
        raise InputError(
            "the image processor does not fit the model",
            f"{hub.name} gives {min(channels)} channels, the model takes {hub.channels}",
            "correct preprocessor_config.json",
        )
    fixed = len(shapes) == 1
    size = next(iter(shapes))[1:] if fixed else (None, None)
    if wanted.size is not None and size != tuple(wanted.size):
        raise InputError(
            f"model.preprocess.size {list(wanted.size)} cannot be applied",
            f"{hub.name} gives images of {' and '.join(f'{one[1]} x {one[2]}' for one in sorted(shapes)[:2])}",
            "leave it out, or set size and crop_size in preprocessor_config.json",
        )
    shared = {"input_size": [hub.channels, *size], "upright": True}
    found = _closest(hub, shared, probes)
    if found is None:
        hub.config = {**shared, "refused": f"the steps of {hub.name} are known to transformers only"}
        unchecked = [name for name in ("mean", "std", "interpolation") if getattr(wanted, name) is not None]
    else:
        hub.config = found.config | shared
        unchecked = [name for name in ("mean", "std") if getattr(wanted, name) is not None and not found.normalises]
        resizes = any("resize" in step for step in found.config["steps"])
        unchecked += ["interpolation"] * (wanted.interpolation is not None and not resizes)
    if unchecked:
        raise InputError(
            f"model.preprocess.{unchecked[0]} cannot be applied",
            f"{hub.name} does not use it in a way that can be checked",
            "leave it out, or correct preprocessor_config.json",
        )


def _closest(
    hub: HubImages, shared: dict[str, Any], probes: Sequence[tuple[np.ndarray, torch.Tensor]]
) -> Candidate | None:
    """The first steps that make the processor's pixels, with the resampling that comes closest."""
    sizes = {name: read_size(hub.processor, name) for name in ("size", "crop_size", "pad_size")}
    backend = "torchvision" if getattr(hub.processor, "backend", "") == "torchvision" else "pillow"
    best: Candidate | None = None
    least = math.inf
    for resampling in (backend, "float"):  # DINOv3 resizes numbers, not bytes
        for one in candidates(hub.processor, sizes, hub.channels, resampling):
            error = _difference(one.config | shared, probes)
            if error is not None:
                best, least = (one, error) if error < least else (best, least)
                break
    return best


def _difference(config: dict[str, Any], probes: Sequence[tuple[np.ndarray, torch.Tensor]]) -> float | None:
    """Mean difference from the processor's pixels, in levels; None if it exceeds rounding."""
    means = []
    level = np.abs(np.float32(config["scale"]) / np.float32(config["std"])).reshape(-1, 1, 1)
    for image, expected in probes:
        try:
            made = pixels.apply(image, config)
        except (
            ValueError,
            TypeError,
            ZeroDivisionError,
            OverflowError,
        ):  # steps that do not fit this image are not its steps
            return None
        if made.shape != tuple(expected.shape):
            return None
        levels = np.abs(made - expected.numpy()) / level
        if not np.isfinite(levels).all() or levels.max() > MOST_LEVELS or levels.mean() > MEAN_LEVELS:
            return None
        means.append(float(levels.mean()))
    return max(means)
