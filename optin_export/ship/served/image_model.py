"""Triton python backend: an encoded image (PNG, JPEG ...) to pixels. Needs numpy and Pillow in the server's Python.

preprocess.json beside this file: `input_size` [C, H, W], `interpolation`, `crop_mode` and `crop_pct`, `mean` and `std`
of pixels in 0..1; an image is resized, cropped in the middle and normalised as in the evaluation of the model.
"""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from PIL import Image

#: An image of more pixels is refused before it is decoded.
MOST_PIXELS = 64_000_000


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        path = Path(args["model_repository"]) / args["model_version"] / "preprocess.json"
        self.config = json.loads(path.read_text(encoding="utf-8"))
        self.dtype = pb_utils.triton_string_to_numpy(config["output"][0]["data_type"])
        self.name = config["output"][0]["name"]

    def execute(self, requests: list[Any]) -> list[Any]:
        return [self.answer(request) for request in requests]

    def answer(self, request: Any) -> Any:
        images = pb_utils.get_input_tensor_by_name(request, "IMAGE").as_numpy().reshape(-1)
        try:
            pixels = np.stack([prepare(data, self.config) for data in images])
        except Exception as error:  # damaged, gigantic or no images at all: as many types as formats
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(f"cannot read the image: {error}"))
        return pb_utils.InferenceResponse([pb_utils.Tensor(self.name, pixels.astype(self.dtype))])


def prepare(data: bytes, config: dict[str, Any]) -> np.ndarray:
    """One encoded image as float32 [C, H, W]."""
    channels, height, width = config["input_size"]
    image: Image.Image = Image.open(io.BytesIO(data))
    if image.width * image.height > MOST_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels are too many")
    image = image.convert("L" if channels == 1 else "RGB")
    larger = (math.floor(height / config["crop_pct"]), math.floor(width / config["crop_pct"]))
    image = image.resize(_resized(image, larger, config["crop_mode"]), _filter(config["interpolation"]))
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    image = image.crop((left, top, left + width, top + height))
    pixels = np.asarray(image, np.float32).reshape(height, width, channels) / 255
    return ((pixels - np.float32(config["mean"])) / np.float32(config["std"])).transpose(2, 0, 1)


def _resized(image: Any, larger: tuple[int, int], mode: str) -> tuple[int, int]:
    """Width and height before the crop: stretched ('squash'), or the shorter edge fitted ('center')."""
    if mode == "squash":
        return larger[1], larger[0]
    if mode != "center":
        raise ValueError(f"crop_mode {mode} is not known here")
    shorter, edge = min(image.size), max(larger)
    return tuple(edge if size == shorter else int(edge * size / shorter) for size in image.size)  # type: ignore[return-value]


def _filter(name: str) -> Any:
    return {"nearest": Image.Resampling.NEAREST, "bilinear": Image.Resampling.BILINEAR}.get(
        name, Image.Resampling.BICUBIC
    )
