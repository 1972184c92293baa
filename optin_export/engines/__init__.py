"""engines: an exported model and a target become an engine with `run`. Knows nothing of pruning. One file per kind.

An engine file offers `SOURCE` and `SUFFIX` (of what it is built from, and of what it builds), `build(source, target,
path, shapes)`, `load(path, target)`, `files(path)`, `versions(target)` and `unavailable(target)`; it is found by
the target's name.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from optin_export.recipe import Target

__all__ = [
    "CALL",
    "MODES",
    "Engine",
    "Timed",
    "Timer",
    "artefact",
    "build",
    "files",
    "gpu_name",
    "load",
    "modes",
    "source_of",
    "unavailable",
    "versions",
]

Arrays = dict[str, np.ndarray]
#: Runs an engine once on inputs that were given before; returns milliseconds.
Timer = Callable[[], float]
#: What a caller sees: inputs come from the host's memory, outputs end there, every kernel is launched again.
CALL = "call"
#: What one measured call may hold. device: inputs and outputs stay on the device. graph: a CUDA graph is replayed.
MODES = {
    CALL: "copies in and out",
    "call+graph": "copies in and out, CUDA graph",
    "device": "no copies",
    "device+graph": "no copies, CUDA graph",
}


class Engine(Protocol):
    """A loaded engine. Inputs and outputs are numpy arrays by name; the first dimension is the batch."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def run(self, inputs: Mapping[str, np.ndarray]) -> Arrays: ...


@runtime_checkable
class Timed(Engine, Protocol):
    """An engine that brings its own clock, because the host's does not see what happens on its device."""

    #: Those of `MODES` that it can be timed in, `CALL` first.
    modes: tuple[str, ...]

    def timer(self, inputs: Mapping[str, np.ndarray], mode: str) -> Timer: ...


def modes(engine: Engine) -> tuple[str, ...]:
    """The modes in which an engine can be timed."""
    return engine.modes if isinstance(engine, Timed) else (CALL,)


def build(
    source: Path, target: Target, path: Path, shapes: Sequence[Mapping[str, tuple[int, ...]]] = ()
) -> dict[str, Any]:
    """Build the engine file `path` from `source`, an ONNX file or a torch program (`source_of`); facts about it.

    shapes: of the inputs by name, one entry per shipped batch size, for engines that are built for fixed shapes.
    Raises EnvironmentLacks when the library of the target is missing, ParityError when it refuses the graph.
    """
    return _backend(target).build(source, target, path, shapes)


def load(path: Path, target: Target) -> Engine:
    """Load an engine file that `build` wrote."""
    return _backend(target).load(path, target)


def source_of(folder: Path, target: Target, which: str) -> Path:
    """What an engine of this target is built from, below a run folder."""
    return folder / "onnx" / f"{which}{_backend(target).SOURCE}"


def artefact(folder: Path, target: Target, which: str) -> Path:
    """Path of the engine of the 'base' or 'pruned' model in a run folder."""
    return folder / "engines" / target.name / f"{which}{_backend(target).SUFFIX}"


def files(path: Path, target: Target) -> list[Path]:
    """What `build` wrote for the engine file `path`: the file, its record and its weights where it has them."""
    return _backend(target).files(path)


def versions(target: Target) -> dict[str, str]:
    """Versions that an engine of this target depends on."""
    return _backend(target).versions(target)


def unavailable(target: Target) -> str | None:
    """Why engines of this target can be built but not run on this machine; None if they can."""
    return _backend(target).unavailable(target)


def gpu_name() -> str | None:
    """Name and compute capability of this machine's first GPU; None without one that works."""
    from optin_export.engines import _device

    return _device.gpu_name()


def _backend(target: Target) -> Any:
    # TensorRT and TensorRT for RTX are one backend.
    return importlib.import_module(f"{__name__}.{target.engine.partition('-')[0]}")
