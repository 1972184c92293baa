"""The parts of a TensorRT build: parsed network, optimization profiles, configuration, and the trtexec command."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from optin_export.errors import EnvironmentLacks, OptinError, ParityError
from optin_export.progress import reporter
from optin_export.recipe import Target

Shape = tuple[int, ...]
#: Input shapes at one shipped batch size, by name.
Shapes = Mapping[str, Shape]
#: (min, opt, max) of every input.
Profile = dict[str, tuple[Shape, Shape, Shape]]
#: Output name -> dynamic axis -> the input, and its axis of the same length.
Axes = dict[str, dict[int, tuple[str, int]]]
#: The exporter's smallest sequence.
LEAST_SEQUENCE = 2
#: The first version with all features used here.
OLDEST = (10, 9)
#: TensorRT's names of kernels that compute a whole attention.
_FUSED = re.compile(r"(?<![a-z])f?mha(?![a-z])|flash_?att", re.IGNORECASE)


def checked_version(trt: Any) -> Any:
    """The library; raises EnvironmentLacks for a full TensorRT that is too old."""
    found = tuple(int(part) for part in re.findall(r"\d+", trt.__version__)[:2])
    if trt.__name__ == "tensorrt" and found < OLDEST:
        wanted = ".".join(map(str, OLDEST))
        why, fix = f"this needs {wanted} or later", f"pip install 'tensorrt>={wanted}'"
        raise EnvironmentLacks(f"TensorRT {trt.__version__} is too old", why, fix)
    return trt


def logger(trt: Any) -> Any:
    """A logger that keeps errors and warnings, which contain the reason for a failure."""

    class Log(trt.ILogger):
        def __init__(self) -> None:
            super().__init__()
            self.messages: list[str] = []

        def log(self, severity: Any, text: str) -> None:
            if severity in (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR):
                self.messages.append(text)

        def reason(self) -> str:
            return "; ".join(self.messages[-3:])[:400] or "it gave no reason"

    return Log()


def monitor(trt: Any) -> Any:
    """Progress of the build's outermost phase."""
    show = reporter()  # TensorRT calls from its own threads

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            super().__init__()
            self.steps: dict[str, int] = {}
            self.outer: str | None = None

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.steps[phase_name] = num_steps
            if parent_phase is None:
                self.outer = phase_name

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name == self.outer:
                show(step + 1, self.steps[phase_name])
            return True

        def phase_finish(self, phase_name: str) -> None:
            total = self.steps.pop(phase_name, 0)
            if phase_name == self.outer:
                show(total, total)

    return Monitor()


def parse(trt: Any, builder: Any, log: Any, onnx: Path) -> tuple[Any, Any]:
    """The network of an ONNX file, and the parser, which must live as long because the network refers to its weights.

    Raises ParityError that names every node the parser refuses.
    """
    definition = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(definition, log)
    # The parser needs the path to find external weights.
    if not parser.parse(onnx.read_bytes(), str(onnx)):
        every = [parser.get_error(index) for index in range(parser.num_errors)]
        errors = "; ".join(f"{refusal.node_operator()} '{refusal.node_name()}': {refusal.desc()}" for refusal in every)
        raise ParityError(
            f"{trt.__name__} cannot parse {onnx.name}",
            errors[:600] or log.reason(),
            "replace the operator, or report it",
        )
    return definition, parser


def profiles_of(definition: Any, shapes: Sequence[Shapes], dynamic: bool) -> list[Profile]:
    """One static profile per shipped batch size, or one that ranges over all (and over shorter sequences)."""
    if not dynamic:
        return [{name: (shape, shape, shape) for name, shape in one.items()} for one in shapes]
    declared = {
        definition.get_input(index).name: tuple(definition.get_input(index).shape)
        for index in range(definition.num_inputs)
    }
    largest = max(shapes, key=lambda one: next(iter(one.values()))[0])
    smallest = {
        name: tuple(
            1 if axis == 0 else LEAST_SEQUENCE if declared[name][axis] == -1 else size
            for axis, size in enumerate(shape)
        )
        for name, shape in largest.items()
    }
    return [{name: (smallest[name], shape, shape) for name, shape in largest.items()}]


def configure(trt: Any, builder: Any, target: Target, log: Any) -> Any:
    """The builder's configuration from the target's options."""
    options, config = target.tensorrt, builder.create_builder_config()
    if options.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace << 20)
    config.builder_optimization_level = options.builder_optimization_level
    config.profiling_verbosity = getattr(trt.ProfilingVerbosity, options.profiling_verbosity.upper())
    flags = {
        "VERSION_COMPATIBLE": options.version_compatible,
        "REFIT": options.refit,
        "STRIP_PLAN": options.strip_plan,
        "WEIGHT_STREAMING": options.weight_streaming,
    }
    for name, wanted in flags.items():
        if wanted:
            _supported(trt.BuilderFlag, name, trt, f"tensorrt.{name.lower()}")
            config.set_flag(getattr(trt.BuilderFlag, name))
    if options.hardware_compatibility != "none":
        level = options.hardware_compatibility.upper()
        _supported(trt.HardwareCompatibilityLevel, level, trt, "tensorrt.hardware_compatibility")
        config.hardware_compatibility_level = getattr(trt.HardwareCompatibilityLevel, level)
    if hasattr(config, "set_compute_capability"):  # TensorRT for RTX
        capabilities = options.compute_capabilities or ("current",)
        config.num_compute_capabilities = len(capabilities)
        for index, capability in enumerate(capabilities):
            name = "CURRENT" if capability == "current" else "SM" + capability.replace(".", "")
            _supported(trt.ComputeCapability, name, trt, "tensorrt.compute_capabilities")
            if not config.set_compute_capability(getattr(trt.ComputeCapability, name), index):
                raise EnvironmentLacks(
                    f"{trt.__name__} cannot build for compute capability '{capability}'",
                    log.reason(),
                    "give those of the GPUs that will serve, e.g. tensorrt: {compute_capabilities: ['8.9']}",
                )
    return config


def _supported(enum: Any, name: str, trt: Any, option: str) -> None:
    if not hasattr(enum, name):
        known = ", ".join(member.lower() for member in enum.__members__)
        what = f"{trt.__name__} {trt.__version__} has no {name.lower()}"
        raise EnvironmentLacks(what, f"it has {known}", f"set {option}")


def failed(log: Any, target: Target) -> OptinError:
    """The error for a build that made no engine, with the reason."""
    reason = log.reason()
    if "memory" in reason.lower():
        fix = "set a smaller targets.tensorrt.workspace (MiB), smaller export.batch, or free GPU memory"
        return EnvironmentLacks(f"{target.engine} ran out of memory while building", reason, fix)
    return ParityError(f"{target.engine} cannot build this network", reason, "report the layer named there")


def trtexec_line(target: Target, onnx: Path, path: Path, profiles: Sequence[Profile]) -> str:
    """The command that builds the same engine with the library's own tool."""
    options = target.tensorrt
    words = ["trtexec" if target.engine == "tensorrt" else "tensorrt_rtx", f"--onnx={onnx}", f"--saveEngine={path}"]
    for number, profile in enumerate(profiles):
        if len(profiles) > 1:
            words.append(f"--profile={number}")
        for position, word in enumerate(("min", "opt", "max")):
            shapes = ",".join(f"{name}:{'x'.join(map(str, ranges[position]))}" for name, ranges in profile.items())
            words.append(f"--{word}Shapes={shapes}")
    if options.workspace is not None:
        words.append(f"--memPoolSize=workspace:{options.workspace}M")
    words.append(f"--builderOptimizationLevel={options.builder_optimization_level}")
    words.append(f"--profilingVerbosity={options.profiling_verbosity}")
    switches = {
        "--stronglyTyped": target.engine == "tensorrt",
        "--versionCompatible": options.version_compatible,
        "--refit": options.refit,
        "--stripWeights": options.strip_plan,
        "--allowWeightStreaming": options.weight_streaming,
    }
    words += [switch for switch, wanted in switches.items() if wanted]
    if options.hardware_compatibility != "none":
        words.append(f"--hardwareCompatibilityLevel={options.hardware_compatibility}")
    if options.compute_capabilities:
        words.append(f"--computeCapabilities={','.join(options.compute_capabilities)}")
    return " ".join(words)


def fitted(
    profiles: Sequence[Mapping[str, Sequence[Shape]]], inputs: Mapping[str, np.ndarray]
) -> tuple[int, dict[str, np.ndarray]]:
    """The smallest profile that holds `inputs`, and the inputs padded with zeros to its minimum.

    Raises ParityError for inputs outside every profile.
    """
    order = sorted(
        range(len(profiles)), key=lambda number: [np.prod(ranges[2]) for ranges in profiles[number].values()]
    )
    for number in order:
        profile = profiles[number]
        if all(
            array.ndim == len(profile[name][2])
            and all(size <= most for size, most in zip(array.shape, profile[name][2], strict=True))
            for name, array in inputs.items()
        ):
            return number, {name: _padded(array, profile[name][0]) for name, array in inputs.items()}
    given = {name: array.shape for name, array in inputs.items()}
    held = [{name: tuple(ranges[2]) for name, ranges in profile.items()} for profile in profiles]
    raise ParityError(f"no optimization profile covers {given}", f"the largest are {held}", "build for this shape")


def _padded(array: np.ndarray, least: Shape) -> np.ndarray:
    missing = [max(0, wanted - size) for size, wanted in zip(array.shape, least, strict=True)]
    return np.pad(array, [(0, more) for more in missing]) if any(missing) else array


def dynamic_axes(model: Any) -> Axes:
    """The axes of an ONNX model's outputs that share a declared dimension with an axis of an input.

    They are matched by names ("batch", "sequence"), never by sizes: a sequence may be as long as an embedding.
    """
    inputs = {
        dimension.dim_param: (one.name, axis)
        for one in reversed(model.graph.input)
        for axis, dimension in enumerate(one.type.tensor_type.shape.dim)
        if dimension.dim_param
    }
    return {
        one.name: {
            axis: inputs[dimension.dim_param]
            for axis, dimension in enumerate(one.type.tensor_type.shape.dim)
            if dimension.dim_param in inputs
        }
        for one in model.graph.output
    }


def read_axes(entries: Mapping[str, Sequence[Sequence[Any]]]) -> Axes:
    """The axes as `write_axes` wrote them."""
    return {name: {int(axis): (str(source), int(at)) for axis, source, at in one} for name, one in entries.items()}


def write_axes(axes: Axes) -> dict[str, list[list[Any]]]:
    """{output: [[axis, input, axis of the input]]}, for JSON."""
    return {name: [[axis, *source] for axis, source in one.items()] for name, one in axes.items()}


def cut(array: np.ndarray, axes: Mapping[int, tuple[str, int]], given: Mapping[str, Shape]) -> np.ndarray:
    """An output without padding: every dynamic axis is cut to the length of the input's axis.

    axes: of this output (see `dynamic_axes`). given: the shapes of the inputs before they were padded.
    """
    for axis, (name, at) in axes.items():
        array = array[(slice(None),) * axis + (slice(given[name][at]),)]
    return array


def layers_of(information: str) -> dict[str, Any]:
    """The inspector's description of an engine: {"Layers": one entry each, a name or (detailed) a dictionary, ...}"""
    try:
        found = json.loads(information)
        return found if isinstance(found.get("Layers"), list) else {"unavailable": "the inspector returned no layers"}
    except (ValueError, AttributeError):
        return {"unavailable": f"the inspector returned no JSON: {information[:100]}"}


def count_layers(found: Mapping[str, Any]) -> dict[str, int]:
    """{"layers", "fused_attention"}: number of all layers, and of kernels for a whole attention, by name or tactic.

    TensorRT calls these kernels mha (`_gemm_mha_v2`, fmha, fused_mha_v2); it names other attention layers differently.
    """
    if "Layers" not in found:
        return {}
    words = [
        " ".join(str(layer.get(key, "")) for key in ("Name", "LayerType", "TacticName"))
        if isinstance(layer, dict)
        else str(layer)
        for layer in found["Layers"]
    ]
    return {"layers": len(words), "fused_attention": sum(bool(_FUSED.search(word)) for word in words)}
