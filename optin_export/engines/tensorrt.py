"""TensorRT: one backend for two libraries with the same interface, `tensorrt` (10.9 and later, 11) and `tensorrt_rtx`.

Networks are strongly typed: precision lives in the ONNX graph. One engine file holds a static optimization profile per
shipped batch size, or with `dynamic` a single one with ranges. TensorRT for RTX builds on a machine without a GPU, for
the compute capabilities named in the target; running any engine takes a GPU and its driver.

Beside each engine lies a record (`.plan.json`) with its sha256, library, version and device: deserialising runs native
code, so what the record does not name is never deserialised.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from optin_export.engines import _tensorrt_network as network
from optin_export.engines._tensorrt_network import Shapes
from optin_export.errors import EnvironmentLacks, InputError, ParityError, missing_package
from optin_export.files import atomic_path, sha256_file, write_json
from optin_export.recipe import Target

SOURCE, SUFFIX = ".onnx", ".plan"
_MODULES = {"tensorrt": ("tensorrt", "gpu"), "tensorrt-rtx": ("tensorrt_rtx", "rtx")}
Tick = Callable[[int, int], None]


class TensorRTEngine:
    """An engine on the GPU; `run` takes and gives numpy arrays by name, copies included.

    A batch (or sequence) that no profile holds exactly is padded with zeros to the next one, and cut again.
    """

    def __init__(self, trt: Any, engine: Any) -> None:
        import torch

        self._engine, self._context = engine, engine.create_execution_context()
        if self._context is None:
            raise EnvironmentLacks("the engine gets no execution context", "not enough GPU memory", "free some")
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        is_input = {name: engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT for name in names}
        self.inputs = tuple(name for name in names if is_input[name])
        self.outputs = tuple(name for name in names if not is_input[name])
        self._profiles = [
            {name: tuple(tuple(dims) for dims in engine.get_tensor_profile_shape(name, index)) for name in self.inputs}
            for index in range(engine.num_optimization_profiles)
        ]
        self._dtypes = {name: np.dtype(trt.nptype(engine.get_tensor_dtype(name))) for name in names}
        self._stream, self._chosen = torch.cuda.Stream(), -1

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        import torch

        number, fitted = network.fitted(self._profiles, {name: inputs[name] for name in self.inputs})
        stream = self._stream.cuda_stream
        with torch.cuda.stream(self._stream):
            if number != self._chosen:
                self._context.set_optimization_profile_async(number, stream)
                self._stream.synchronize()
                self._chosen = number
            held = {}
            for name, array in fitted.items():
                held[name] = torch.from_numpy(np.ascontiguousarray(array, self._dtypes[name])).cuda(non_blocking=True)
                self._context.set_input_shape(name, tuple(array.shape))
            for name in self.outputs:
                shape = tuple(self._context.get_tensor_shape(name))
                dtype = getattr(torch, self._dtypes[name].name)
                held[name] = torch.empty(shape, dtype=dtype, device="cuda")
            for name, tensor in held.items():
                self._context.set_tensor_address(name, tensor.data_ptr())
            if not self._context.execute_async_v3(stream):
                raise ParityError("TensorRT did not run the engine", "see its log", "build the engine again")
            results = {name: held[name].cpu().numpy() for name in self.outputs}
        self._stream.synchronize()
        given, padded = inputs[self.inputs[0]].shape, fitted[self.inputs[0]].shape
        return {name: network.cut(array, given, padded) for name, array in results.items()}


def build(onnx: Path, target: Target, path: Path, shapes: Sequence[Shapes], tick: Tick) -> dict[str, Any]:
    """Parse `onnx`, build an engine for `shapes` (one entry per shipped batch size) and write it with its record.

    Raises ParityError with every parser error by node, EnvironmentLacks without the library or memory, InputError for
    options that the library or machine does not have.
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
    config.progress_monitor = network.monitor(trt, tick)
    cache = _timing_cache(trt, config, target)
    plan = builder.build_serialized_network(definition, config)
    if plan is None:
        raise network.failed(log, target)
    if cache is not None:
        with atomic_path(cache) as temporary:
            temporary.write_bytes(bytes(config.get_timing_cache().serialize()))
    with atomic_path(path) as temporary:
        temporary.write_bytes(bytes(plan))
    facts = {
        "library": trt.__name__,
        "version": trt.__version__,
        "device": _device(),
        "compute_capabilities": list(target.tensorrt.compute_capabilities),
        "profiles": [{name: [list(dims) for dims in ranges] for name, ranges in one.items()} for one in profiles],
        "bytes": path.stat().st_size,
        "trtexec": network.trtexec_line(target, onnx, path, profiles),
    }
    write_json(_record(path), {"sha256": sha256_file(path), **facts})
    return facts


def load(path: Path, target: Target) -> TensorRTEngine:
    """Deserialise an engine that `build` wrote, after its record has been checked."""
    trt = _import(target)
    check_record(path, trt.__name__, trt.__version__, _device())
    reason = unavailable(target)
    if reason is not None:
        raise EnvironmentLacks(f"cannot run {path.name} here", reason, "run it on a machine with an NVIDIA GPU")
    log = network.logger(trt)
    engine = trt.Runtime(log).deserialize_cuda_engine(path.read_bytes())
    if engine is None:
        raise EnvironmentLacks(f"TensorRT cannot load {path.name}", log.reason(), "build it again on this machine")
    return TensorRTEngine(trt, engine)


def check_record(path: Path, library: str, version: str, device: str | None) -> None:
    """Raises InputError unless the record beside `path` names this very file, library, version and device."""
    fix = "build it again on this machine (--force)"
    try:
        record = json.loads(_record(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise InputError(f"{path.name} has no readable record", "deserialising an engine runs its code", fix) from None
    if record.get("sha256") != sha256_file(path):
        raise InputError(f"{path.name} is not the file that was built", "its sha256 is another", fix)
    if (record.get("library"), record.get("version")) != (library, version):
        why = f"by {record.get('library')} {record.get('version')}, this is {library} {version}"
        raise InputError(f"{path.name} was built by another library", why, fix)
    if record.get("device") not in (None, device):
        raise InputError(f"{path.name} was built for another GPU", f"{record['device']}, this is {device}", fix)


def versions(target: Target) -> dict[str, str]:
    trt = _import(target)
    return {trt.__name__: trt.__version__, **({"gpu": device} if (device := _device()) else {})}


def unavailable(target: Target) -> str | None:
    """Why engines of this target can be built but not run here; None if they can."""
    device = _device()
    if device is None:
        return "there is no NVIDIA GPU with a working driver"
    if target.tensorrt.strip_plan:
        return "its file holds no weights until they are refitted"
    if target.engine == "tensorrt-rtx" and "sm90" in device:
        return "TensorRT for RTX does not support Hopper (compute capability 9.0)"
    return None


def _device() -> str | None:
    """Name and compute capability of the first GPU, e.g. 'NVIDIA L4 (sm89)'."""
    import torch

    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability(0)
    return f"{torch.cuda.get_device_name(0)} (sm{major}{minor})"


def _timing_cache(trt: Any, config: Any, target: Target) -> Path | None:
    """Timings of kernels per library version and GPU. None on RTX, where asking for a cache asks for a GPU."""
    device = _device()
    if target.engine != "tensorrt" or device is None:
        return None
    name = f"tensorrt-{trt.__version__}-{device}.cache".replace(" ", "_").replace("(", "").replace(")", "")
    path = Path.home() / ".cache" / "optin-export" / name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None  # a home that cannot be written to: every kernel is timed anew
    config.set_timing_cache(config.create_timing_cache(path.read_bytes() if path.exists() else b""), False)
    return path


def files(path: Path) -> list[Path]:
    return [path, _record(path)]


def _record(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _import(target: Target) -> Any:
    module, extra = _MODULES[target.engine]
    try:
        return importlib.import_module(module)
    except ImportError as error:
        if error.name is not None and error.name.partition(".")[0] == module:
            raise missing_package(module, f"the target engine: {target.engine}", extra) from None
        raise EnvironmentLacks(
            f"{module} does not load", str(error), "reinstall it, with the driver it needs"
        ) from None
