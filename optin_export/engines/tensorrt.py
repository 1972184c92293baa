"""TensorRT: one backend for two libraries with the same interface, `tensorrt` (10.9 and later, 11) and `tensorrt_rtx`.

Networks are strongly typed: precision lives in the ONNX graph. One engine file holds a static optimization profile per
shipped batch size, or with `dynamic` a single one with ranges. TensorRT for RTX builds on a machine without a GPU, for
the compute capabilities named in the target; running any engine requires a GPU and its driver.

Each engine has a record (`.plan.json`) with its sha256, library, version and device: deserialising runs native code, so
a file that does not match its record is never deserialised.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from optin_export.engines import MODES, Timer
from optin_export.engines import _device as devices
from optin_export.engines import _tensorrt_network as network
from optin_export.engines._device import Launch, Tensors
from optin_export.engines._tensorrt_network import Shapes
from optin_export.errors import EnvironmentLacks, ParityError, missing_package
from optin_export.export.graph_file import read_graph
from optin_export.recipe import Target
from optin_export.workdir.files import atomic_path, read_checked, read_json, sha256_file, write_checked, write_json

SOURCE, SUFFIX = ".onnx", ".plan"
_MODULES = {"tensorrt": ("tensorrt", "gpu"), "tensorrt-rtx": ("tensorrt_rtx", "rtx")}
#: Maximum bytes of a timing cache, which holds the timings of every kernel that was tried on this GPU.
MAX_TIMING_CACHE = 256 << 20


class TensorRTEngine:
    """An engine on the GPU; `run` takes and gives numpy arrays by name, copies included.

    A batch (or sequence) that does not fit a profile exactly is padded with zeros to the next one, and its output cut.
    """

    modes = tuple(MODES)

    def __init__(self, trt: Any, engine: Any, size: int, axes: network.Axes) -> None:
        self._engine, self._context = engine, engine.create_execution_context()
        if self._context is None:
            raise EnvironmentLacks(
                "failed to create the execution context",
                "not enough GPU memory",
                "free GPU memory, or lower export.batch",
            )
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        is_input = {name: engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT for name in names}
        self.inputs = tuple(name for name in names if is_input[name])
        self.outputs = tuple(name for name in names if not is_input[name])
        self._profiles = [
            {name: tuple(tuple(dims) for dims in engine.get_tensor_profile_shape(name, index)) for name in self.inputs}
            for index in range(engine.num_optimization_profiles)
        ]
        self._dtypes = {name: np.dtype(trt.nptype(engine.get_tensor_dtype(name))) for name in names}
        self._axes = axes
        self._device, self._size, self._chosen = devices.Gpu(), size, -1

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        fitted = self._fitted(inputs)
        results = devices.run(self._bind, fitted, self._device)
        given = {name: inputs[name].shape for name in self.inputs}
        return {name: network.cut(array, self._axes[name], given) for name, array in results.items()}

    def timer(self, inputs: Mapping[str, np.ndarray], mode: str) -> Timer:
        return devices.timer(self._bind, self._fitted(inputs), mode, self._device)

    def memory(self, inputs: Mapping[str, np.ndarray]) -> dict[str, int]:
        """Bytes on the GPU: the size of the engine file, and its scratch memory for the profile of `inputs`."""
        number, _ = network.fitted(self._profiles, {name: inputs[name] for name in self.inputs})
        scratch = self._engine.get_device_memory_size_for_profile_v2(number)
        return {"model": self._size, "activations": int(scratch)}

    def _fitted(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        _, fitted = network.fitted(self._profiles, {name: inputs[name] for name in self.inputs})
        return {name: np.ascontiguousarray(array, self._dtypes[name]) for name, array in fitted.items()}

    def _bind(self, held: Tensors, graph: bool) -> Launch:
        """The call on the tensors `held`, whose shapes are those of a profile."""
        shapes = {name: np.empty(tuple(tensor.shape), np.bool_) for name, tensor in held.items()}
        number, _ = network.fitted(self._profiles, shapes)
        stream = self._device.stream

        def choose() -> None:
            # One context is used for all batch sizes.
            if number != self._chosen:
                self._context.set_optimization_profile_async(number, stream.cuda_stream)
                stream.synchronize()
                self._chosen = number
            for name, tensor in held.items():
                self._context.set_input_shape(name, tuple(tensor.shape))

        choose()
        outputs = {
            name: torch.empty(
                tuple(self._context.get_tensor_shape(name)),
                dtype=getattr(torch, self._dtypes[name].name),
                device="cuda",
            )
            for name in self.outputs
        }

        def launch() -> Tensors:
            choose()
            for name, tensor in (*held.items(), *outputs.items()):
                self._context.set_tensor_address(name, tensor.data_ptr())
            if not self._context.execute_async_v3(stream.cuda_stream):
                raise ParityError("TensorRT did not run the engine", "see its log", "build the engine again")
            return outputs

        return self._device.captured(launch) if graph else launch


def build(onnx: Path, target: Target, path: Path, shapes: Sequence[Shapes]) -> dict[str, Any]:
    """Parse `onnx`, build an engine for `shapes` (one entry per shipped batch size) and write it with its record.

    Raises ParityError with every parser error by node, EnvironmentLacks if the library or memory is missing, and for
    options that the library or machine does not support.
    """
    trt = _import(target)
    log = network.logger(trt)
    builder = trt.Builder(log)
    definition, _parser = network.parse(trt, builder, log, onnx)
    profiles = network.profiles_of(definition, shapes, target.tensorrt.dynamic)
    config = network.configure(trt, builder, target, log)
    for profile in profiles:
        added = builder.create_optimization_profile()
        for name, (least, best, most) in profile.items():
            added.set_shape(name, least, best, most)
        config.add_optimization_profile(added)
    config.progress_monitor = network.monitor(trt)
    cache = _timing_cache(trt, config, target)
    layers = definition.num_layers
    plan = builder.build_serialized_network(definition, config)
    if plan is None:
        raise network.failed(log, target)
    if cache is not None:
        write_checked(cache, bytes(config.get_timing_cache().serialize()))
    with atomic_path(path) as temporary:
        temporary.write_bytes(bytes(plan))
    facts = {
        "library": trt.__name__,
        "version": trt.__version__,
        "device": _device(),
        "compute_capabilities": list(target.tensorrt.compute_capabilities),
        "profiles": [{name: [list(dims) for dims in ranges] for name, ranges in one.items()} for one in profiles],
        "bytes": path.stat().st_size,
        "network_layers": layers,
        **_write_layers(trt, log, path, target),
        "trtexec": network.trtexec_line(target, onnx, path, profiles),
    }
    axes = network.write_axes(network.dynamic_axes(read_graph(onnx)))
    write_json(_record(path), {"sha256": sha256_file(path), "axes": axes, **facts})
    return facts


def load(path: Path, target: Target) -> TensorRTEngine:
    """Deserialise an engine that `build` wrote, after its record has been checked."""
    trt = _import(target)
    record = check_record(path, trt.__name__, trt.__version__, _device())
    reason = unavailable(target)
    if reason is not None:
        raise EnvironmentLacks(f"cannot run {path.name} here", reason, "run it on a machine with an NVIDIA GPU")
    log = network.logger(trt)
    engine = trt.Runtime(log).deserialize_cuda_engine(path.read_bytes())
    if engine is None:
        raise EnvironmentLacks(f"TensorRT cannot load {path.name}", log.reason(), "build it again on this machine")
    return TensorRTEngine(trt, engine, path.stat().st_size, network.read_axes(record["axes"]))


def _write_layers(trt: Any, log: Any, path: Path, target: Target) -> dict[str, Any]:
    """Write the engine's layers, from TensorRT's inspector, next to it; returns counts.

    This requires deserialising the engine; if that is impossible, the file contains the reason.
    """
    reason = unavailable(target)
    engine = None if reason else trt.Runtime(log).deserialize_cuda_engine(path.read_bytes())
    if engine is None:
        write_json(_layers(path), {"unavailable": reason or log.reason()})
        return {}
    inspector = engine.create_engine_inspector()
    described = network.layers_of(inspector.get_engine_information(trt.LayerInformationFormat.JSON))
    write_json(_layers(path), described)
    return network.count_layers(described)


def check_record(path: Path, library: str, version: str, device: str | None) -> dict[str, Any]:
    """The record of the engine `path`, after checking that file, library, version and device match it.

    Raises ParityError for a file that was changed, EnvironmentLacks for one that was built in another environment.
    """
    fix = "build it again on this machine (--force)"
    try:
        record = dict(read_json(_record(path)))
    except (OSError, ValueError, TypeError):
        raise ParityError(f"{path.name} has no readable record", "deserialising an engine runs its code", fix) from None
    if record.get("sha256") != sha256_file(path):
        raise ParityError(f"{path.name} is not the file that was built", "its sha256 differs", fix)
    if (record.get("library"), record.get("version")) != (library, version):
        why = f"by {record.get('library')} {record.get('version')}, this is {library} {version}"
        raise EnvironmentLacks(f"{path.name} was built by another library", why, fix)
    if record.get("device") not in (None, device):
        why = f"{record['device']}, this is {device or 'a machine without one'}"
        raise EnvironmentLacks(f"{path.name} was built for another GPU", why, fix)
    if not isinstance(record.get("axes"), dict):
        raise ParityError(f"{path.name} was built by an earlier version", "its record names no dynamic axes", fix)
    return record


def versions(target: Target) -> dict[str, str]:
    trt = _import(target)
    return {trt.__name__: trt.__version__, **({"gpu": device} if (device := _device()) else {})}


def unavailable(target: Target) -> str | None:
    """The reason why engines of this target can be built but not run here; None if they can run."""
    device = _device()
    if device is None:
        return devices.no_gpu()
    if target.tensorrt.strip_plan:
        return "its file holds no weights until they are refitted"
    if target.engine == "tensorrt-rtx" and "sm90" in device:
        return "TensorRT for RTX does not support Hopper (compute capability 9.0)"
    return None


def _device() -> str | None:
    return devices.gpu_name()


def _timing_cache(trt: Any, config: Any, target: Target) -> Path | None:
    """The timing cache of this library version and GPU. None on RTX, where a cache requires a GPU."""
    device = _device()
    if target.engine != "tensorrt" or device is None:
        return None
    name = f"tensorrt-{trt.__version__}-{device}.cache".replace(" ", "_").replace("(", "").replace(")", "")
    path = Path.home() / ".cache" / "optin-export" / name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None  # the home folder is not writable: every kernel is timed again
    # A damaged or too large cache is replaced by an empty one.
    known = read_checked(path, MAX_TIMING_CACHE)
    if known is None and path.exists():
        logging.getLogger(__name__).warning("%s is damaged or too large; kernels are timed again", path)
    config.set_timing_cache(config.create_timing_cache(known or b""), False)
    return path


def files(path: Path) -> list[Path]:
    return [path, _record(path), _layers(path)]


def _layers(path: Path) -> Path:
    return path.with_name(path.name + ".layers.json")


def _record(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _import(target: Target) -> Any:
    module, extra = _MODULES[target.engine]
    try:
        return network.checked_version(importlib.import_module(module))
    except ImportError as error:
        if error.name is not None and error.name.partition(".")[0] == module:
            raise missing_package(module, f"the target engine: {target.engine}", extra) from None
        raise EnvironmentLacks(
            f"{module} cannot be loaded", str(error), "reinstall it, with the driver it needs"
        ) from None
