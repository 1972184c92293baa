"""Triton python backend: an ONNX graph in onnxruntime. Needs numpy and onnxruntime in the server's Python.

Reads config.pbtxt: `parameters` has the file next to this one and the threads; inputs and outputs are the graph's.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        import onnxruntime

        config = json.loads(args["model_config"])
        given = {name: entry["string_value"] for name, entry in config["parameters"].items()}
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = int(given["threads"])
        options.inter_op_num_threads = 1
        # Base and pruned model are served together: the idle one must not spin on the other's cores.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        path = Path(args["model_repository"]) / args["model_version"] / given["file"]
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.inputs = [entry["name"] for entry in config["input"]]
        self.outputs = [entry["name"] for entry in config["output"]]

    def execute(self, requests: list[Any]) -> list[Any]:
        """Run the requests of one dynamic batch together; they have the same shape except for the number of rows."""
        rows = [
            {name: pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in self.inputs}
            for request in requests
        ]
        feed = {name: np.concatenate([one[name] for one in rows]) for name in self.inputs}
        results = self.session.run(self.outputs, feed)
        ends = np.cumsum([len(one[self.inputs[0]]) for one in rows])[:-1]
        parts = zip(*(np.split(result, ends) for result in results), strict=True)
        return [
            pb_utils.InferenceResponse(
                [pb_utils.Tensor(name, array) for name, array in zip(self.outputs, answer, strict=True)]
            )
            for answer in parts
        ]
