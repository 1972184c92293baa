"""Triton python backend: an engine of TensorRT or TensorRT for RTX. Needs that library and torch with CUDA.

Reads config.pbtxt: `parameters` has the engine file next to this one, its sha256 and the Python module of the library.
Deserialising an engine runs its code, so a file with another sha256 is refused.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        given = {name: entry["string_value"] for name, entry in config["parameters"].items()}
        data = (Path(args["model_repository"]) / args["model_version"] / given["file"]).read_bytes()
        if hashlib.sha256(data).hexdigest() != given["sha256"]:
            raise pb_utils.TritonModelException(f"{given['file']} is not the engine that was shipped")
        self.trt = importlib.import_module(given["module"])
        self.runtime = self.trt.Runtime(self.trt.Logger(self.trt.Logger.WARNING))
        self.engine = self.runtime.deserialize_cuda_engine(data)
        if self.engine is None:
            raise pb_utils.TritonModelException(f"{given['module']} cannot load {given['file']} on this machine")
        self.context = self.engine.create_execution_context()
        self.stream = torch.cuda.Stream()
        self.inputs = [entry["name"] for entry in config["input"]]
        self.outputs = [entry["name"] for entry in config["output"]]

    def execute(self, requests: list[Any]) -> list[Any]:
        rows = [
            {name: pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in self.inputs}
            for request in requests
        ]
        feed = {name: np.concatenate([one[name] for one in rows]) for name in self.inputs}
        results = self.run(feed)
        ends = np.cumsum([len(one[self.inputs[0]]) for one in rows])[:-1]
        parts = zip(*(np.split(result, ends) for result in results), strict=True)
        return [
            pb_utils.InferenceResponse(
                [pb_utils.Tensor(name, array) for name, array in zip(self.outputs, answer, strict=True)]
            )
            for answer in parts
        ]

    def run(self, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
        """Outputs for one batch; raises an error if no optimization profile fits its shape."""
        stream = self.stream.cuda_stream
        with torch.cuda.stream(self.stream):
            self.context.set_optimization_profile_async(self.profile(feed), stream)
            held = {}
            for name, array in feed.items():
                dtype = self.trt.nptype(self.engine.get_tensor_dtype(name))
                held[name] = torch.from_numpy(np.ascontiguousarray(array, dtype)).cuda(non_blocking=True)
                self.context.set_input_shape(name, tuple(array.shape))
            for name in self.outputs:
                dtype = np.dtype(self.trt.nptype(self.engine.get_tensor_dtype(name))).name
                shape = tuple(self.context.get_tensor_shape(name))
                held[name] = torch.empty(shape, dtype=getattr(torch, dtype), device="cuda")
            for name, tensor in held.items():
                self.context.set_tensor_address(name, tensor.data_ptr())
            if not self.context.execute_async_v3(stream):
                raise pb_utils.TritonModelException("TensorRT did not run the engine")
            results = [held[name].cpu().numpy() for name in self.outputs]
        self.stream.synchronize()
        return results

    def profile(self, feed: dict[str, np.ndarray]) -> int:
        for index in range(self.engine.num_optimization_profiles):
            ranges = {name: self.engine.get_tensor_profile_shape(name, index) for name in feed}
            if all(
                all(low <= size <= high for low, size, high in zip(least, feed[name].shape, most, strict=True))
                for name, (least, _, most) in ranges.items()
            ):
                return index
        shapes = {name: list(array.shape) for name, array in feed.items()}
        raise pb_utils.TritonModelException(f"the engine was not built for {shapes}")
