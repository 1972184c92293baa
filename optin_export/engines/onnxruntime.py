"""onnxruntime on the CPU, or on a GPU with its CUDA or TensorRT provider.

On the CPU the engine file is the graph that onnxruntime optimised for this machine. On a GPU it is the ONNX file
itself: a provider compiles the graph for one session, when it loads.
"""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from optin_export.engines import CALL, MODES, Timer
from optin_export.engines import _device as devices
from optin_export.engines._device import Launch, Tensors
from optin_export.engines._unsigned import shift_activations
from optin_export.errors import EnvironmentLacks, ParityError, missing_package
from optin_export.recipe import Target
from optin_export.workdir.files import Scratch
from optin_export.workdir.onnx_files import (
    SMALL,
    atomic_graph,
    copy_graph,
    data_file,
    graph_bytes,
    graph_files,
    is_external,
    save_graph,
)

SOURCE = SUFFIX = ".onnx"
_PROVIDERS = {"cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}
_X86 = ("x86_64", "amd64")
#: Disabled on the CPU: the fused kernel takes longer than Add and LayerNormalization, whose kernels are vectorised
#: (docs/results.md; tools/studies/study_fusion.py).
_SLOWER = ("SkipLayerNormFusion",)
#: Runs of a session in graph mode until it has captured a graph and replays it.
_UNTIL_CAPTURED = 3


class OnnxRuntimeEngine:
    """An onnxruntime session on the CPU; `run` takes and returns numpy arrays by name."""

    def __init__(self, session: Any) -> None:
        self.session = session
        self.inputs = tuple(value.name for value in session.get_inputs())
        self.outputs = tuple(value.name for value in session.get_outputs())

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        feed = {name: inputs[name] for name in self.inputs}
        return dict(zip(self.outputs, self.session.run(self.outputs, feed), strict=True))


class BoundEngine:
    """A session whose inputs and outputs can be bound to buffers on a device.

    open_session: whether it captures CUDA graphs -> the session. device: where it computes.
    """

    def __init__(self, open_session: Callable[[bool], Any], device: devices.Device) -> None:
        self._open, self._device = open_session, device
        self._plain = OnnxRuntimeEngine(open_session(False))
        self.inputs, self.outputs = self._plain.inputs, self._plain.outputs
        self.modes = tuple(MODES) if device.name == "cuda" else (CALL,)
        self._capturing: Any = None
        self._graphs = 0

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return self._plain.run(inputs)

    def timer(self, inputs: Mapping[str, np.ndarray], mode: str) -> Timer:
        return devices.timer(self._bind, {name: inputs[name] for name in self.inputs}, mode, self._device)

    def memory(self, inputs: Mapping[str, np.ndarray]) -> dict[str, int]:
        """GPU bytes that another session takes when it loads (arena and weights), and for its first call."""
        before = torch.cuda.mem_get_info()[0]
        engine = OnnxRuntimeEngine(self._open(False))
        loaded = torch.cuda.mem_get_info()[0]
        engine.run(inputs)
        return {"model": max(0, before - loaded), "activations": max(0, loaded - torch.cuda.mem_get_info()[0])}

    def _bind(self, held: Tensors, graph: bool) -> Launch:
        """Bind the tensors `held`, and outputs of the shapes that a first run shows."""
        place, options = self._device.name, _import().RunOptions()
        # The device's clock waits for the stream, so the session need not.
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        first = self.run({name: tensor.cpu().numpy() for name, tensor in held.items()})
        outputs = {name: torch.empty_like(torch.from_numpy(array), device=place) for name, array in first.items()}
        if graph:
            if self._capturing is None:
                self._capturing = self._open(True)
            self._graphs += 1  # a graph contains the addresses of its buffers: one graph for each set
            options.add_run_config_entry("gpu_graph_id", str(self._graphs))
        session = self._capturing if graph else self._plain.session
        binding = session.io_binding()
        for bind, tensors in ((binding.bind_input, held), (binding.bind_output, outputs)):
            for name, tensor in tensors.items():
                kind = torch.empty(0, dtype=tensor.dtype).numpy().dtype.type
                bind(name, place, 0, kind, tuple(tensor.shape), tensor.data_ptr())

        def launch() -> Tensors:
            session.run_with_iobinding(binding, options)
            return outputs

        if graph:
            for _ in range(_UNTIL_CAPTURED):
                launch()
        return launch


def build(onnx: Path, target: Target, path: Path, shapes: Sequence[Mapping[str, tuple[int, ...]]]) -> dict[str, Any]:
    """Optimise `onnx` at the highest level and save the result; raises ParityError if onnxruntime refuses it."""
    runtime = _import()
    options = _options(runtime, target)
    if target.device == "cuda":
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
        _session(runtime, onnx, options)  # raises for a graph that it cannot read
        with atomic_graph(path) as temporary:
            copy_graph(onnx, temporary)
        return {"bytes": graph_bytes(path), **versions(target), "provider": target.provider}
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_ALL
    with atomic_graph(path) as temporary, contextlib.closing(Scratch()) as scratch:
        options.optimized_model_filepath = str(temporary)
        if is_external(onnx):
            for key, value in (("file_name", data_file(path).name), ("min_size_in_bytes", str(SMALL))):
                options.add_session_config_entry(f"session.optimized_model_external_initializers_{key}", value)
        _session(runtime, _for_this_cpu(onnx, scratch.path), options, disabled=_SLOWER)
    return {"bytes": graph_bytes(path), "onnxruntime": runtime.__version__, "threads": target.threads}


def _for_this_cpu(path: Path, folder: Path) -> Path:
    """The graph, or on x86 a copy in `folder` with unsigned int8 activations, which the kernels require."""
    import onnx
    from google.protobuf.message import DecodeError

    if platform.machine().lower() not in _X86:
        return path
    try:
        model = onnx.load(path, load_external_data=False)
    except DecodeError:  # onnxruntime reports the error
        return path
    if not any(node.op_type == "QuantizeLinear" for node in model.graph.node):
        return path
    model = onnx.load(path)
    if not shift_activations(model):
        return path
    save_graph(model, folder / path.name, is_external(path))
    return folder / path.name


def load(path: Path, target: Target) -> OnnxRuntimeEngine | BoundEngine:
    """Load what `build` wrote; on the CPU it is not optimised again.

    Raises EnvironmentLacks for a GPU that does not exist, or that the provider cannot use.
    """
    runtime = _import()
    if target.device == "cuda":
        return _on_gpu(runtime, path, target)
    options = _options(runtime, target)
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return OnnxRuntimeEngine(_session(runtime, path, options))


def _on_gpu(runtime: Any, path: Path, target: Target) -> BoundEngine:
    reason = unavailable(target)
    if reason is not None:
        raise EnvironmentLacks(f"cannot run {path.name} here", reason, "run it on a machine with an NVIDIA GPU")
    gpu, provider = devices.Gpu(), _PROVIDERS[target.provider]

    def open_session(graph: bool) -> Any:
        # Work is queued on the stream that the events time, so nothing else may run.
        stream = {"device_id": "0", "user_compute_stream": str(gpu.stream.cuda_stream)}
        own = {"enable_cuda_graph" if target.provider == "cuda" else "trt_cuda_graph_enable": "1" if graph else "0"}
        chosen = [(provider, {**stream, **own})]
        if provider != _PROVIDERS["cuda"]:
            chosen.append((_PROVIDERS["cuda"], stream))
        session = _session(runtime, path, _options(runtime, target), [*chosen, "CPUExecutionProvider"])
        if provider not in session.get_providers():
            raise EnvironmentLacks(
                f"onnxruntime runs {path.name} without its {target.provider} provider",
                f"{provider} did not load: libraries of CUDA, cuDNN or TensorRT are missing, or have another version",
                "install those that this onnxruntime-gpu was built with",
            )
        return session

    return BoundEngine(open_session, gpu)


def versions(target: Target) -> dict[str, str]:
    """Raises EnvironmentLacks if this onnxruntime has no provider for the target."""
    runtime = _import()
    if target.device != "cuda":
        return {"onnxruntime": runtime.__version__}
    provider = _PROVIDERS[target.provider]
    if provider not in runtime.get_available_providers():
        raise EnvironmentLacks(
            f"the installed onnxruntime has no {target.provider} provider",
            f"{provider} is in the package onnxruntime-gpu, which overwrites the files of onnxruntime",
            "pip uninstall -y onnxruntime && pip install --force-reinstall onnxruntime-gpu",
        )
    return {"onnxruntime-gpu": runtime.__version__, **({"gpu": name} if (name := devices.gpu_name()) else {})}


def files(path: Path) -> list[Path]:
    return graph_files(path)


def unavailable(target: Target) -> str | None:
    return devices.no_gpu() if target.device == "cuda" else None


def _options(runtime: Any, target: Target) -> Any:
    options = runtime.SessionOptions()
    options.intra_op_num_threads = target.threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Two sessions are measured alternately in one process: the idle one's threads must not spin on the other's cores.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def _session(
    runtime: Any,
    path: Path,
    options: Any,
    providers: Sequence[Any] = ("CPUExecutionProvider",),
    disabled: Sequence[str] = (),
) -> Any:
    """A session. disabled: names of graph optimisers to disable."""
    try:
        return runtime.InferenceSession(
            str(path), options, providers=list(providers), disabled_optimizers=list(disabled)
        )
    except Exception as error:  # onnxruntime's exception types are not importable by name across versions
        why = str(error).splitlines()[0][:300]
        if "CPUExecutionProvider" in str(error):
            raise EnvironmentLacks("onnxruntime has no CPU provider", why, "reinstall onnxruntime") from error
        if "memory" in why.lower() or "CUDA" in why:
            raise EnvironmentLacks(
                f"onnxruntime cannot load {path.name} onto the GPU", why, "free GPU memory, or lower export.batch"
            ) from error
        raise ParityError(f"onnxruntime cannot load {path.name}", why, "export again; report the operator") from error


def _import() -> Any:
    try:
        import onnxruntime
    except ImportError:
        raise missing_package("onnxruntime", "the target engine: onnxruntime", "cpu") from None
    return onnxruntime
