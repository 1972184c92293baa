"""onnxruntime on the CPU. The engine file is the graph as onnxruntime optimised it for this machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from optin_export.errors import EnvironmentLacks, ParityError, missing_package
from optin_export.files import atomic_path
from optin_export.recipe import Target

SUFFIX = ".onnx"


class OnnxRuntimeEngine:
    """A session of onnxruntime; `run` takes and gives numpy arrays by name."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self.inputs = tuple(value.name for value in session.get_inputs())
        self.outputs = tuple(value.name for value in session.get_outputs())

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        feed = {name: inputs[name] for name in self.inputs}
        return dict(zip(self.outputs, self._session.run(self.outputs, feed), strict=True))


def build(
    onnx: Path,
    target: Target,
    path: Path,
    shapes: Sequence[Mapping[str, tuple[int, ...]]],
    tick: Callable[[int, int], None],
) -> dict[str, Any]:
    """Optimise `onnx` at the highest level and save the result; raises ParityError if onnxruntime refuses it."""
    runtime = _import()
    options = _options(runtime, target)
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_ALL
    with atomic_path(path) as temporary:
        options.optimized_model_filepath = str(temporary)
        _session(runtime, onnx, options)
    return {"bytes": path.stat().st_size, "onnxruntime": runtime.__version__, "threads": target.threads}


def load(path: Path, target: Target) -> OnnxRuntimeEngine:
    """Load a graph that `build` optimised; it is not optimised again."""
    runtime = _import()
    options = _options(runtime, target)
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return OnnxRuntimeEngine(_session(runtime, path, options))


def versions(target: Target) -> dict[str, str]:
    return {"onnxruntime": _import().__version__}


def files(path: Path) -> list[Path]:
    return [path]


def unavailable(target: Target) -> None:
    return None


def _options(runtime: Any, target: Target) -> Any:
    options = runtime.SessionOptions()
    options.intra_op_num_threads = target.threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Two sessions are measured in turn in one process: the idle one's threads must not spin on the other's cores.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def _session(runtime: Any, path: Path, options: Any) -> Any:
    try:
        return runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exception types are not importable by name across versions
        if "CPUExecutionProvider" in str(error):
            raise EnvironmentLacks("onnxruntime has no CPU provider", str(error), "reinstall onnxruntime") from error
        raise ParityError(
            f"onnxruntime cannot load {path.name}",
            str(error).splitlines()[0][:300],
            "export again; report the operator",
        ) from error


def _import() -> Any:
    try:
        import onnxruntime
    except ImportError:
        raise missing_package("onnxruntime", "the target engine: onnxruntime", "cpu") from None
    return onnxruntime
