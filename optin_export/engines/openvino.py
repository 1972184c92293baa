"""OpenVINO on the CPU (extra `openvino`). The engine is OpenVINO's graph: NAME.xml, and NAME.bin with its weights.

The runtime compiles it when it loads, for any batch size. By default it computes in bf16 where the CPU
can, so every engine states its precision. fp32 and bf16 engines have the same fp32 graph and differ in the kernels; an
int8 engine has the graph that NNCF quantised (`export.nncf`), whose other operators run in the CPU's default precision.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from optin_export.errors import EnvironmentLacks, ParityError, missing_package
from optin_export.recipe import Target, model_of, precision_of
from optin_export.workdir.onnx_files import atomic_graph, copy_graph, graph_bytes, graph_files

SOURCE, SUFFIX = ".onnx", ".xml"
#: OpenVINO's names of the precisions that are stated. int8 has none: see `_precision`.
_HINTS = {"fp32": "f32", "bf16": "bf16"}


class OpenVinoEngine:
    """A compiled graph on the CPU; `run` takes and returns numpy arrays by name."""

    def __init__(self, compiled: Any) -> None:
        self.inputs = tuple(port.any_name for port in compiled.inputs)
        self.outputs = tuple(port.any_name for port in compiled.outputs)
        self.compiled, self._request = compiled, compiled.create_infer_request()

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        results = self._request.infer({name: inputs[name] for name in self.inputs}, share_inputs=True)
        return {name: results[name] for name in self.outputs}


def source_name(name: str) -> str:
    """The file from which the engine `name` is built: the fp32 graph, or for int8 the quantised one."""
    return f"{name}.xml" if precision_of(name) == "int8" else f"{model_of(name)}{SOURCE}"


def build(source: Path, target: Target, path: Path, shapes: Sequence[Mapping[str, tuple[int, ...]]]) -> dict[str, Any]:
    """Write the graph `source` as an engine, and compile it once.

    Raises ParityError if OpenVINO refuses it, EnvironmentLacks for a precision that this CPU does not have.
    """
    runtime = _import()
    precision = precision_of(path.stem)
    reason = lacks(precision)
    if reason is not None:
        raise EnvironmentLacks(
            f"{path.name} cannot be built for this CPU", reason, "use export.precision: fp32 or int8"
        )
    with atomic_graph(path) as temporary:
        if source.suffix == SUFFIX:
            copy_graph(source, temporary)
        else:
            model = _checked(source, lambda: runtime.Core().read_model(source))
            runtime.save_model(model, temporary, compress_to_fp16=False)
    engine = load(path, target)
    return {
        "bytes": graph_bytes(path),
        **versions(target),
        "threads": target.threads,
        "kernels": engine.compiled.get_property("INFERENCE_PRECISION_HINT").to_string(),
    }


def load(path: Path, target: Target) -> OpenVinoEngine:
    """Compile what `build` wrote, in the precision that its name states."""
    core = _import().Core()
    options = {
        "INFERENCE_PRECISION_HINT": _precision(core, precision_of(path.stem)),
        "INFERENCE_NUM_THREADS": target.threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        # A pinned thread would share its core with whatever else runs there; other engines do not pin theirs.
        "ENABLE_CPU_PINNING": False,
    }
    return OpenVinoEngine(_checked(path, lambda: core.compile_model(core.read_model(path), "CPU", options)))


def versions(target: Target) -> dict[str, str]:
    """Raises EnvironmentLacks without the package or its CPU plugin."""
    runtime = _import()
    if "CPU" not in runtime.Core().available_devices:
        raise EnvironmentLacks("OpenVINO has no CPU plugin", "its installation is not complete", "reinstall openvino")
    return {"openvino": runtime.__version__.partition("-")[0]}  # the rest is the commit


def files(path: Path) -> list[Path]:
    return graph_files(path)


def unavailable(target: Target) -> str | None:
    return None


def lacks(precision: str) -> str | None:
    """The reason why this CPU has no kernels of a precision, or None."""
    if precision != "bf16" or "BF16" in _import().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        return None
    return "it has no instructions for bf16 (AVX512_BF16 or AMX)"


def _precision(core: Any, precision: str) -> str:
    """The precision of floating-point kernels; around int8 the CPU's default, as Triton's backend cannot change it."""
    if precision == "int8":
        return "bf16" if core.get_property("CPU", "INFERENCE_PRECISION_HINT").to_string() == "bf16" else "f32"
    return _HINTS.get(precision, "f32")


def _checked(path: Path, read: Any) -> Any:
    try:
        return read()
    except RuntimeError as error:  # the only type that the runtime raises
        why = next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), "no reason given")
        raise ParityError(
            f"OpenVINO cannot load {path.name}", why[:300], "export again; report the operator"
        ) from error


def _import() -> Any:
    try:
        import openvino
    except ImportError:
        raise missing_package("openvino", "the target engine: openvino", "openvino") from None
    return openvino
