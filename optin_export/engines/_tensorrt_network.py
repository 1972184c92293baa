"""The parts of a TensorRT build: parsed network, optimization profiles, configuration, and the trtexec command."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from optin_export.engines._polygraphy import Polygraphy, Reasons, explained
from optin_export.engines._tensorrt_shapes import Profile, Shapes
from optin_export.errors import EnvironmentLacks, OptinError, ParityError
from optin_export.progress import reporter
from optin_export.recipe import Target

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


def parse(tools: Polygraphy, onnx: Path) -> tuple[Any, Any, Any]:
    """Builder, network and parser of an ONNX file.

    Raises ParityError that names every node the parser refuses.
    """

    def refusal(found: Reasons) -> ParityError:
        refused = "; ".join(one for one in found if one.startswith("In node "))[:600]
        return ParityError(
            f"{tools.trt.__name__} cannot parse {onnx.name}",
            refused or found.last(),
            "replace the operator, or report it",
        )

    with explained(refusal):
        builder, definition, parser = tools.backend.network_from_onnx_path(str(onnx), strongly_typed=True)
    return builder, definition, parser


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


def configure(tools: Polygraphy, target: Target, profiles: Sequence[Profile], **more: Any) -> Any:
    """The loader of the builder's configuration from the target's options.

    more: further arguments of Polygraphy's CreateConfig. Raises EnvironmentLacks for what this library does not have.
    """
    options, trt = target.tensorrt, tools.trt
    if options.hardware_compatibility != "none":
        level = options.hardware_compatibility.upper()
        _supported(trt.HardwareCompatibilityLevel, level, trt, "tensorrt.hardware_compatibility")
        more["hardware_compatibility_level"] = getattr(trt.HardwareCompatibilityLevel, level)
    if options.workspace is not None:
        more["memory_pool_limits"] = {trt.MemoryPoolType.WORKSPACE: options.workspace << 20}
    if tools.is_rtx:
        for capability in options.compute_capabilities:
            _supported(trt.ComputeCapability, f"SM{capability.replace('.', '')}", trt, "tensorrt.compute_capabilities")
        pairs = [tuple(int(part) for part in one.split(".")) for one in options.compute_capabilities]
        more |= {"compute_capabilities": pairs} if pairs else {"use_gpu": True}
    return tools.create_config(
        profiles=[_profile(tools, one) for one in profiles],
        builder_optimization_level=options.builder_optimization_level,
        profiling_verbosity=getattr(trt.ProfilingVerbosity, options.profiling_verbosity.upper()),
        version_compatible=options.version_compatible,
        refittable=options.refit,
        strip_plan=options.strip_plan,
        weight_streaming=options.weight_streaming,
        **more,
    )


def _profile(tools: Polygraphy, ranges: Profile) -> Any:
    profile = tools.backend.Profile()
    for name, (least, best, most) in ranges.items():
        profile.add(name, least, best, most)
    return profile


def _supported(enum: Any, name: str, trt: Any, option: str) -> None:
    if not hasattr(enum, name):
        known = ", ".join(member.lower() for member in enum.__members__)
        what = f"{trt.__name__} {trt.__version__} has no {name.lower()}"
        raise EnvironmentLacks(what, f"it has {known}", f"set {option}")


def engine_bytes(
    tools: Polygraphy, parsed: tuple[Any, Any, Any], config: Any, target: Target, cache: str | None = None
) -> bytes:
    """The serialised engine of a parsed network. cache: a file for the timing cache, read by `config`, written here.

    Raises EnvironmentLacks without enough memory and for options that the machine does not support, else ParityError.
    """
    with explained(lambda found: failed(found.last(), target)):
        return bytes(tools.backend.engine_bytes_from_network(parsed, config=config, save_timing_cache=cache))


def failed(reason: str, target: Target) -> OptinError:
    """The error for a build that made no engine, with the library's reason."""
    if "is not available on TensorRT version" in reason:  # Polygraphy, of an option
        return EnvironmentLacks(f"{target.engine} cannot build for this target", reason, "change targets.tensorrt")
    if "driver" in reason.lower() and target.engine == "tensorrt-rtx":
        fix = "give the GPUs that will serve, e.g. tensorrt: {compute_capabilities: [8.9]}"
        return EnvironmentLacks(f"{target.engine} cannot build for this machine's GPU", reason, fix)
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
