"""From an encoded image to a model's pixels, with numpy and Pillow only.

The evaluation imports this module, and a copy of it prepares the images in a server: both run the same arithmetic. It
must import nothing but the standard library, numpy and Pillow.

`config` is what preprocess.json holds. Either timm's data configuration (`input_size`, `interpolation`, `crop_mode`,
`crop_pct`, `mean`, `std`), or a list of `steps` with:
    input_size: [C, H, W] of the result; H and W are None while they depend on the images
    resampling: 'pillow'; 'torchvision', which resizes the width first, each channel separately; or 'float', which does
        not round to bytes
    steps: one-entry dictionaries, `resize`, `crop`, `crop_share` or (after the values) `pad`, applied in order
    reverse_channels: blue, green, red instead of red, green, blue
    scale, offset, mean, std: value -> ((value * scale + offset) - mean) / std, for values in 0..255
Both may hold `upright` (rotate the image by its EXIF orientation), and `refused`: why a server cannot do this.
"""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

#: Checked by content, not by suffix: some of the other formats that Pillow supports start programs.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
#: A resized image of more pixels is refused before it is made: an image of 60000 x 1 would become gigabytes.
MOST_RESIZED = 32_000_000
#: Channels of the model -> Pillow's mode of its images.
MODES = {1: "L", 3: "RGB", 4: "RGBA"}
#: The EXIF tag of the orientation.
ORIENTATION = 0x0112
_FILTERS = ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")


class WrongChannels(ValueError):
    """An image that does not have the channels that the model takes."""


def prepare(data: bytes, config: dict[str, Any], most_pixels: int | None = None) -> np.ndarray:
    """One encoded image as float32 [C, H, W].

    most_pixels: an image with more is refused before it is decoded. Raises ValueError for an image that cannot be used,
    and what Pillow raises for one that cannot be read.
    """
    if config.get("refused"):
        raise ValueError(config["refused"])
    return apply(array_of(open_image(data, config, most_pixels)), config)


def open_image(source: Any, config: dict[str, Any], most_pixels: int | None = None, whole: bool = False) -> Image.Image:
    """The image in the mode that the model's channels require: L, RGB or RGBA.

    source: encoded bytes, a Path, a Pillow image, or a uint8 array [H, W] or [H, W, C]. whole: refuse an image that
    would be rotated, because its label map would not be.
    """
    image = header(source)
    if most_pixels is not None and image.width * image.height > most_pixels:
        raise ValueError(f"{image.width} x {image.height} pixels are too many (at most {most_pixels})")
    check_header(image, config)
    if config.get("upright"):
        if whole and image.getexif().get(ORIENTATION, 1) not in (0, 1):
            raise ValueError(
                "it is stored rotated (EXIF orientation), and its label map may not be: store both upright"
            )
        image = ImageOps.exif_transpose(image)
        check_sizes(config, image.width, image.height)  # a PNG may have its orientation after the pixels
    return to_mode(image, config["input_size"][0])


def check_header(image: Image.Image, config: dict[str, Any]) -> tuple[int, int]:
    """Height and width of the result, without decoding the image; raises ValueError for one that does not fit."""
    _refuse_mode(image, config["input_size"][0])
    return check_sizes(config, *_turned(image, config))


def header(source: Any) -> Image.Image:
    """The image (only the header of a file); raises what Pillow raises for formats other than FORMATS."""
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8:
            raise ValueError(f"it is an array of {source.dtype}: give uint8")
        return Image.fromarray(source[..., 0] if source.ndim == 3 and source.shape[2] == 1 else source)
    if isinstance(source, bytes | bytearray | memoryview):
        return Image.open(io.BytesIO(bytes(source)), formats=FORMATS)
    if isinstance(source, Path):
        return Image.open(source, formats=FORMATS)
    raise ValueError(f"a {type(source).__name__} is not an image")


def _turned(image: Image.Image, config: dict[str, Any]) -> tuple[int, int]:
    """Width and height after the EXIF orientation, if that is known before the image is decoded."""
    known = image.format != "PNG" or "exif" in image.info
    swaps = config.get("upright") and known and image.getexif().get(ORIENTATION, 1) in (5, 6, 7, 8)
    return (image.height, image.width) if swaps else (image.width, image.height)


def to_mode(image: Image.Image, channels: int) -> Image.Image:
    """Convert as `Image.convert` does; 16-bit images are scaled to 8 bits. Raises ValueError if no conversion fits."""
    _refuse_mode(image, channels)
    if _is_wide(image):
        # Pillow's own conversion clips everything above 255, which makes the image white.
        image = Image.fromarray(np.round(np.asarray(image).astype(np.float64) / 257).astype(np.uint8))
    return image.convert(MODES[channels])


def _is_wide(image: Image.Image) -> bool:
    """Whether its pixels have 16 bits."""
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG")


def _refuse_mode(image: Image.Image, channels: int) -> None:
    if channels not in MODES:
        raise WrongChannels(f"the model takes {channels} channels, and image files give 1, 3 or 4")
    if image.mode in ("I", "F") and not _is_wide(image):
        raise ValueError(f"its pixels (mode {image.mode}) have no known range: save it with 8 or 16 bits per channel")
    bands = image.getbands()
    if channels == 4 and not ("A" in bands or "a" in bands or "transparency" in image.info):
        raise WrongChannels(
            f"the model takes 4 channels: red, green, blue and alpha; this image (mode {image.mode}) has no alpha"
        )


def array_of(image: Image.Image) -> np.ndarray:
    """uint8 [H, W, C]."""
    values = np.asarray(image)
    return values[..., None] if values.ndim == 2 else values


def apply(image: np.ndarray, config: dict[str, Any]) -> np.ndarray:
    """uint8 [H, W, C] as float32 [C, H, W]; raises ValueError if that is not the size that the model takes."""
    pad = None
    for step in steps_of(config):
        ((name, rule),) = step.items()
        if name == "resize":
            image = _resize(image, resized(rule, image.shape[1], image.shape[0]), rule["filter"], config)
        elif name == "crop":
            image = _crop(image, rule["size"], rule)
        elif name == "crop_share":
            shorter = min(image.shape[:2])
            image = _crop(image, [int(share * shorter) for share in rule["share"]], rule)
        else:
            pad = rule["size"]
    pixels = values(image, config)
    if pad is not None:  # to the right and below, with zeros of the result
        below, right = pad[0] - pixels.shape[1], pad[1] - pixels.shape[2]
        if min(below, right) < 0:
            raise ValueError(f"{pixels.shape[1]} x {pixels.shape[2]} pixels are more than the padded {pad}")
        pixels = np.pad(pixels, ((0, 0), (0, below), (0, right)))
    wanted = list(config["input_size"])
    if None not in wanted and list(pixels.shape) != wanted:
        raise ValueError(f"the image becomes {list(pixels.shape)}, the model takes {wanted}")
    return pixels


def values(image: np.ndarray, config: dict[str, Any]) -> np.ndarray:
    """uint8 [..., H, W, C] as float32 [..., C, H, W], scaled and normalised."""
    if config.get("reverse_channels"):
        image = image[..., ::-1]
    scale = float(config.get("scale", 1 / 255))
    plain = image.astype(np.float32)
    # A division, as in the libraries: multiplying by the inverse would change the last bit.
    scaled = plain / np.float32(255) if abs(scale * 255 - 1) < 1e-7 else plain * np.float32(scale)
    shifted = (scaled + np.float32(config.get("offset", 0.0))) - np.float32(config["mean"])
    return np.ascontiguousarray(np.moveaxis(shifted / np.float32(config["std"]), -1, -3))


def steps_of(config: dict[str, Any]) -> list[dict[str, Any]]:
    """The steps of a configuration; timm's configuration gives the steps of its evaluation transform."""
    if "steps" in config:
        return list(config["steps"])
    _, height, width = config["input_size"]
    share = config.get("crop_pct") or 0.875
    larger = [math.floor(height / share), math.floor(width / share)]
    mode, how = config.get("crop_mode") or "center", config.get("interpolation") or "bilinear"
    crop: dict[str, Any] = {"size": [height, width], "round": True}
    if mode == "squash":
        resize: dict[str, Any] = {"rule": "exact", "size": larger}
    elif mode == "border":
        resize = {"rule": "ratio", "size": larger, "longest": True}
        crop["fill"] = [round(255 * value) for value in config["mean"]]
    elif mode == "center":
        square = larger[0] == larger[1]
        resize = {"rule": "shortest", "edge": larger[0]} if square else {"rule": "ratio", "size": larger}
    else:
        raise ValueError(f"crop_mode {mode} is not known")
    return [{"resize": {**resize, "filter": how}}, {"crop": crop}]


def keeps_the_whole(config: dict[str, Any]) -> bool:
    """Whether every image is only stretched; a prediction then covers the same area as a label map."""
    _, height, width = config["input_size"]

    def keeps(name: str, rule: dict[str, Any], before: dict[str, Any] | None) -> bool:
        if name == "resize":
            return True
        exact = before is not None and before.get("rule") == "exact"
        return name == "crop" and exact and list(before["size"]) == list(rule["size"]) == [height, width]  # type: ignore[index]

    before: dict[str, Any] | None = None
    for step in steps_of(config):
        ((name, rule),) = step.items()
        if not keeps(name, rule, before):
            return False
        before = rule if name == "resize" else before
    return True


def check_sizes(config: dict[str, Any], width: int, height: int) -> tuple[int, int]:
    """Height and width of the result for an image of this size, without making it.

    Raises ValueError if an intermediate image would have more than MOST_RESIZED pixels.
    """
    if min(width, height) < 1:
        raise ValueError("it has no pixels")
    if config.get("refused") and max(width, height) > 200 * min(width, height):  # later sizes are unknown
        raise ValueError(f"{width} x {height} pixels are too long and narrow")
    for step in [] if config.get("refused") else steps_of(config):
        ((name, rule),) = step.items()
        if name == "resize":
            new = resized(rule, width, height)
            if min(new) < 1:
                raise ValueError(f"{width} x {height} pixels would be resized to {new[1]} x {new[0]}")
            if new[1] * max(new[0], height) > MOST_RESIZED:
                raise ValueError(
                    f"{width} x {height} pixels would be resized to {new[1]} x {new[0]}: too long and narrow"
                )
            height, width = new
        elif name == "crop_share":
            shorter = min(width, height)
            height, width = (int(share * shorter) for share in rule["share"])
        else:
            height, width = rule["size"]
    return height, width


def resized(rule: dict[str, Any], width: int, height: int) -> tuple[int, int]:
    """Height and width that a `resize` step gives an image."""
    kind = rule["rule"]
    if kind == "exact":
        new = (rule["size"][0], rule["size"][1])
    elif kind == "shortest":
        new = _shortest(rule["edge"], width, height)
    elif kind == "shortest_rounded":
        share = rule["edge"] / min(width, height)
        new = (round(height * share), round(width * share))
    elif kind == "shortest_longest":
        new = _shortest_longest(rule["edge"], rule["longest"], width, height)
    elif kind == "fit":
        share = min(rule["size"][0] / height, rule["size"][1] / width)
        new = (int(height * share), int(width * share))
    elif kind == "ratio":  # timm: the box is covered, or with `longest` filled without a cut
        ratios = (height / rule["size"][0], width / rule["size"][1])
        # The sum is timm's own; its rounding counts.
        longest = float(rule.get("longest", False))
        ratio = max(ratios) * longest + min(ratios) * (1.0 - longest)
        new = (round(height / ratio), round(width / ratio))
    elif kind == "scale":  # DPT: resize as little as possible, both sides by one factor if the ratio is kept
        down, across = rule["size"][0] / height, rule["size"][1] / width
        if rule["keep"]:
            down = across = across if abs(1 - across) < abs(1 - down) else down
        several = rule["of"]
        new = (round(down * height / several) * several, round(across * width / several) * several)
    else:
        raise ValueError(f"resize rule {kind} is not known")
    up = rule.get("multiple")
    return (math.ceil(new[0] / up) * up, math.ceil(new[1] / up) * up) if up else new


def _shortest(edge: int, width: int, height: int) -> tuple[int, int]:
    longer = int(edge * max(width, height) / min(width, height))
    return (longer, edge) if width <= height else (edge, longer)


def _shortest_longest(edge: int, longest: int, width: int, height: int) -> tuple[int, int]:
    """As in DETR: the shorter side becomes `edge`, or less if the longer side would exceed `longest`."""
    low, high = float(min(width, height)), float(max(width, height))
    exact: float | None = None
    if high / low * edge > longest:
        exact = longest * low / high
        edge = round(exact)
    if min(width, height) == edge:
        return height, width
    factor = edge if exact is None else exact
    return (int(factor * height / width), edge) if width < height else (edge, int(factor * width / height))


def _resize(image: np.ndarray, new: tuple[int, int], how: str, config: dict[str, Any]) -> np.ndarray:
    height, width = new
    if how not in _FILTERS:
        raise ValueError(f"interpolation {how} is not known")
    if config.get("resampling") == "float":
        planes = [image[..., channel].astype(np.float32) for channel in range(image.shape[2])]
        return np.stack([_pillow(one, new, how) for one in planes], -1)
    if config.get("resampling") == "torchvision":
        if how == "nearest":
            return image[_nearest(image.shape[0], height)][:, _nearest(image.shape[1], width)]
        # Pillow may resize the height first, and rounds between the two passes, so each pass is a separate call.
        planes = [image[..., channel] for channel in range(image.shape[2])]
        done = [_pillow(_pillow(one, (len(image), width), how), new, how) for one in planes]
        return np.stack(done, -1)
    if image.shape[2] not in MODES:
        return np.stack([_pillow(image[..., channel], new, how) for channel in range(image.shape[2])], -1)
    return _pillow(image[..., 0], new, how)[..., None] if image.shape[2] == 1 else _pillow(image, new, how)


def _pillow(image: np.ndarray, new: tuple[int, int], how: str) -> np.ndarray:
    return np.asarray(Image.fromarray(np.ascontiguousarray(image)).resize(new[::-1], Image.Resampling[how.upper()]))


def _nearest(old: int, new: int) -> np.ndarray:
    """Positions that torch's `nearest-exact` reads, in its float32."""
    places = (np.arange(new, dtype=np.float32) + np.float32(0.5)) * (np.float32(old) / np.float32(new))
    return np.minimum(np.floor(places).astype(np.int64), old - 1)


def _crop(image: np.ndarray, size: list[int], rule: dict[str, Any]) -> np.ndarray:
    """The middle of an image; one that is smaller gets a border first."""
    more = [max(want - have, 0) for want, have in zip(size, image.shape[:2], strict=True)]
    if any(more):
        fill = rule.get("fill", [0] * image.shape[2])
        around = np.empty((image.shape[0] + more[0], image.shape[1] + more[1], image.shape[2]), image.dtype)
        around[:] = np.asarray(fill, image.dtype)
        top, left = more[0] // 2, more[1] // 2
        around[top : top + image.shape[0], left : left + image.shape[1]] = image
        image = around
    place = [(have - want) / 2.0 for want, have in zip(size, image.shape[:2], strict=True)]
    top, left = (round(one) if rule.get("round") else int(one) for one in place)
    return image[top : top + size[0], left : left + size[1]]
