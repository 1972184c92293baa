"""TensorRT: one backend for two libraries with the same interface, `tensorrt` (10.9 and later, 11) and `tensorrt_rtx`.
Polygraphy builds, loads and runs; what it does not have is here and in `_tensorrt_network`.

Networks are strongly typed: precision lives in the ONNX graph. One engine file holds a static optimization profile per
shipped batch size, or with `dynamic` a single one with ranges. TensorRT for RTX builds on a machine without a GPU, for
the compute capabilities named in the target; running any engine requires a GPU and its driver.

Each engine has a record (`.plan.json`) with its sha256, library, version and device: deserialising runs native code, so
a file that does not match its record is never deserialised.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from optin_export.engines import _device as devices
from optin_export.engines import _tensorrt_network as network
from optin_export.engines import _tensorrt_shapes as padding
from optin_export.engines._polygraphy import Polygraphy, Reasons, explained, polygraphy_of
from optin_export.engines._tensorrt_engine import TensorRTEngine
from optin_export.engines._tensorrt_shapes import Shapes
from optin_export.errors import EnvironmentLacks, ParityError, missing_package
from optin_export.export.graph_file import read_graph
from optin_export.recipe import Target
from optin_export.workdir.files import atomic_path, read_checked, read_json, sha256_file, write_checked, write_json

SOURCE, SUFFIX = ".onnx", ".plan"
_MODULES = {"tensorrt": ("tensorrt", "gpu"), "tensorrt-rtx": ("tensorrt_rtx", "rtx")}
#: Maximum bytes of a timing cache, which holds the timings of every kernel that was tried on this GPU.
MAX_TIMING_CACHE = 256 << 20


def build(onnx: Path, target: Target, path: Path, shapes: Sequence[Shapes]) -> dict[str, Any]:
    """Parse `onnx`, build an engine for `shapes` (one entry per shipped batch size) and write it with its record.

    Raises ParityError with every parser error by node, EnvironmentLacks if the library or memory is missing, and for
    options that the library or machine does not support.
    """
    tools = _tools(target)
    parsed = network.parse(tools, onnx)
    profiles = network.profiles_of(parsed[1], shapes, target.tensorrt.dynamic)
    with _timing_cache(tools.trt, target) as cache:
        config = network.configure(
            tools, target, profiles, progress_monitor=network.monitor(tools.trt), load_timing_cache=cache
        )
        plan = network.engine_bytes(tools, parsed, config, target, cache)
    with atomic_path(path) as temporary:
        temporary.write_bytes(plan)
    facts = {
        "library": tools.trt.__name__,
        "version": tools.trt.__version__,
        "device": _device(),
        "compute_capabilities": list(target.tensorrt.compute_capabilities),
        "profiles": [{name: [list(dims) for dims in ranges] for name, ranges in one.items()} for one in profiles],
        "bytes": path.stat().st_size,
        "network_layers": parsed[1].num_layers,
        **_write_layers(tools, path, target),
        "trtexec": network.trtexec_line(target, onnx, path, profiles),
    }
    axes = padding.write_axes(padding.dynamic_axes(read_graph(onnx)))
    write_json(_record(path), {"sha256": sha256_file(path), "axes": axes, **facts})
    return facts


def load(path: Path, target: Target) -> TensorRTEngine:
    """Deserialise an engine that `build` wrote, after its record has been checked."""
    tools = _tools(target)
    record = check_record(path, tools.trt.__name__, tools.trt.__version__, _device())
    reason = unavailable(target)
    if reason is not None:
        raise EnvironmentLacks(f"cannot run {path.name} here", reason, "run it on a machine with an NVIDIA GPU")
    engine = _deserialised(tools, path)
    streams = target.tensorrt.weight_streaming
    return TensorRTEngine(tools, engine, path.stat().st_size, padding.read_axes(record["axes"]), streams)


def _deserialised(tools: Polygraphy, path: Path) -> Any:
    def refusal(found: Reasons) -> EnvironmentLacks:
        return EnvironmentLacks(f"TensorRT cannot load {path.name}", found.last(), "build it again on this machine")

    with explained(refusal):
        return tools.backend.engine_from_bytes(path.read_bytes())


def _write_layers(tools: Polygraphy, path: Path, target: Target) -> dict[str, Any]:
    """Write the engine's layers, from TensorRT's inspector, next to it; returns counts.

    This requires deserialising the engine; if that is impossible, the file contains the reason.
    """
    try:
        if (reason := unavailable(target)) is not None:
            raise EnvironmentLacks("cannot load the engine", reason, "load it on the machine that will serve")
        engine = _deserialised(tools, path)
    except EnvironmentLacks as error:
        write_json(_layers(path), {"unavailable": error.why})
        return {}
    inspector = engine.create_engine_inspector()
    described = network.layers_of(inspector.get_engine_information(tools.trt.LayerInformationFormat.JSON))
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


@contextlib.contextmanager
def _timing_cache(trt: Any, target: Target) -> Iterator[str | None]:
    """A file with the timing cache of this library version and GPU, which is kept if the body succeeds.

    None on RTX, where a cache requires a GPU.
    """
    device = _device()
    if target.engine != "tensorrt" or device is None:
        yield None
        return
    name = f"tensorrt-{trt.__version__}-{device}.cache".replace(" ", "_").replace("(", "").replace(")", "")
    path = Path.home() / ".cache" / "optin-export" / name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError:
        yield None  # the home folder is not writable: every kernel is timed again
        return
    # A damaged or too large cache is replaced by an empty one.
    known = read_checked(path, MAX_TIMING_CACHE)
    if known is None and path.exists():
        logging.getLogger(__name__).warning("%s is damaged or too large; kernels are timed again", path)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "timing.cache"
        file.write_bytes(known or b"")
        yield str(file)
        write_checked(path, file.read_bytes())


def files(path: Path) -> list[Path]:
    return [path, _record(path), _layers(path)]


def _layers(path: Path) -> Path:
    return path.with_name(path.name + ".layers.json")


def _record(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _tools(target: Target) -> Polygraphy:
    return polygraphy_of(_import(target), f"the target engine: {target.engine}", _MODULES[target.engine][1])


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
