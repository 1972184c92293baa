"""Triton python backend: an engine of OpenVINO. Needs numpy and openvino in the server's Python.

Reads config.pbtxt: `parameters` has the file next to this one, the threads and the precision of the kernels (empty: the
CPU's default); inputs and outputs are the graph's.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        import openvino

        config = json.loads(args["model_config"])
        given = {name: entry["string_value"] for name, entry in config["parameters"].items()}
        options: dict[str, Any] = {"INFERENCE_NUM_THREADS": int(given["threads"]), "NUM_STREAMS": 1}
        options |= {"PERFORMANCE_HINT": "LATENCY", "ENABLE_CPU_PINNING": False}
        if given["kernels"]:
            options["INFERENCE_PRECISION_HINT"] = given["kernels"]
        path = Path(args["model_repository"]) / args["model_version"] / given["file"]
        self.request = openvino.Core().compile_model(path, "CPU", options).create_infer_request()
        self.inputs = [entry["name"] for entry in config["input"]]
        self.outputs = [entry["name"] for entry in config["output"]]

    def execute(self, requests: list[Any]) -> list[Any]:
        """Run the requests of one dynamic batch together; they have the same shape except for the number of rows."""
        rows = [
            {name: pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in self.inputs}
            for request in requests
        ]
        feed = {name: np.concatenate([one[name] for one in rows]) for name in self.inputs}
        found = self.request.infer(feed, share_inputs=True)
        ends = np.cumsum([len(one[self.inputs[0]]) for one in rows])[:-1]
        parts = zip(*(np.split(found[name], ends) for name in self.outputs), strict=True)
        return [
            pb_utils.InferenceResponse(
                [pb_utils.Tensor(name, array) for name, array in zip(self.outputs, answer, strict=True)]
            )
            for answer in parts
        ]
