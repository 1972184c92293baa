"""A program: load one graph in a fresh process, run it, and print how long loading took and what memory it holds.

Arguments: library, file, threads, rows (safetensors with `input.NAME`), batch. Prints JSON. It imports the library and
numpy before it looks at the clock and the memory, so that both are those of one more instance of the model.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from safetensors.numpy import load_file

Run = Callable[[Mapping[str, np.ndarray]], Any]


def _onnxruntime() -> Callable[[str, int], tuple[list[str], Run]]:
    import onnxruntime

    def load(file: str, threads: int) -> tuple[list[str], Run]:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        return [value.name for value in session.get_inputs()], lambda feed: session.run(None, dict(feed))

    return load


def _openvino() -> Callable[[str, int], tuple[list[str], Run]]:
    import openvino

    core = openvino.Core()

    def load(file: str, threads: int) -> tuple[list[str], Run]:
        settings = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1}
        model = core.compile_model(core.read_model(file), "CPU", settings)
        return [port.get_any_name() for port in model.inputs], lambda feed: model(dict(feed))

    return load


LIBRARIES = {"onnxruntime": _onnxruntime, "openvino": _openvino}


def main(library: str, file: str, threads: int, rows: str, batch: int) -> dict[str, float]:
    """{'load_seconds', 'memory_bytes'} of one instance."""
    load = LIBRARIES[library]()
    given = {
        name.removeprefix("input."): array for name, array in load_file(Path(rows)).items() if name[:6] == "input."
    }
    process = psutil.Process()
    before = process.memory_info().rss
    begun = time.perf_counter()
    inputs, run = load(file, threads)
    seconds = time.perf_counter() - begun
    run({name: np.resize(given[name], (batch, *given[name].shape[1:])) for name in inputs})
    return {"load_seconds": round(seconds, 3), "memory_bytes": max(0, process.memory_info().rss - before)}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4], int(sys.argv[5]))))
