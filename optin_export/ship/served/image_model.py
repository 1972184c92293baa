"""Triton python backend: an encoded image (PNG, JPEG, WebP, BMP) to pixels. Needs numpy and Pillow in its Python.

In the same folder are preprocess.json, which says how the model's images are prepared, and image_pixels.py, which
prepares them: a copy of the module that the evaluation of the model used.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

#: An image with more pixels is refused before it is decoded.
MOST_PIXELS = 64_000_000


def _arithmetic() -> Any:
    neighbour = Path(__file__).with_name("image_pixels.py")
    spec = importlib.util.spec_from_file_location("image_pixels", neighbour) if neighbour.is_file() else None
    if spec is None or spec.loader is None:  # not in a model repository: the package's own
        return importlib.import_module("optin_export.data.pixels")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_PIXELS = _arithmetic()


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
        except Exception as error:  # damaged, huge or not an image: each format raises its own types
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(f"cannot read the image: {error}"))
        return pb_utils.InferenceResponse([pb_utils.Tensor(self.name, pixels.astype(self.dtype))])


def prepare(data: bytes, config: dict[str, Any]) -> np.ndarray:
    """One encoded image as float32 [C, H, W]; raises ValueError for one that is too large or does not fit."""
    pixels: np.ndarray = _PIXELS.prepare(data, config, MOST_PIXELS)
    return pixels
