"""Build and run engines of an exported model for a target; independent of pruning. One file per kind of engine.

An engine file offers `SOURCE` and `SUFFIX` (the file suffixes of its input and of the engine), `build(source, target,
path, shapes)`, `load(path, target)`, `files(path)`, `versions(target)` and `unavailable(target)`; it is looked up by
the target's name. It may also offer `source_name(name)`, the file in `onnx/` from which the engine `name` is built if
that is not NAME + SOURCE, and `lacks(precision)`, the reason why this machine cannot run a precision.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

if TYPE_CHECKING:
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
    "lacks",
    "load",
    "modes",
    "source_of",
    "unavailable",
    "versions",
]

Arrays = dict[str, np.ndarray]
#: Runs an engine once on inputs that were bound before; returns milliseconds.
Timer = Callable[[], float]
#: The caller's view: inputs come from host memory, outputs return there, every kernel is launched again.
CALL = "call"
#: What one measured call may include. device: inputs and outputs stay on the device. graph: a CUDA graph is replayed.
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
    """An engine with its own clock, because the host's clock does not see what happens on its device."""

    #: The subset of `MODES` in which it can be timed, `CALL` first.
    modes: tuple[str, ...]

    def timer(self, inputs: Mapping[str, np.ndarray], mode: str) -> Timer: ...


def modes(engine: Engine) -> tuple[str, ...]:
    """The modes in which an engine can be timed."""
    return engine.modes if isinstance(engine, Timed) else (CALL,)


def build(
    source: Path, target: Target, path: Path, shapes: Sequence[Mapping[str, tuple[int, ...]]] = ()
) -> dict[str, Any]:
    """Build the engine file `path` from `source`, an ONNX file or a torch program (`source_of`).

    The stem of `path` is the engine's name, with its precision (`recipe.engine_name`).

    shapes: input shapes by name, one entry per shipped batch size, for engines that are built for fixed shapes.
    Returns facts about it. Raises EnvironmentLacks if the target's library is missing, ParityError if it refuses the
    graph.
    """
    return _backend(target).build(source, target, path, shapes)


def load(path: Path, target: Target) -> Engine:
    """Load an engine file that `build` wrote."""
    return _backend(target).load(path, target)


def source_of(folder: Path, target: Target, which: str) -> Path:
    """Path of the file in a run folder from which an engine of this target is built."""
    backend = _backend(target)
    name = backend.source_name(which) if hasattr(backend, "source_name") else f"{which}{backend.SOURCE}"
    return folder / "onnx" / str(name)


def artefact(folder: Path, target: Target, which: str) -> Path:
    """Path of the engine of the 'base' or 'pruned' model in a run folder."""
    return folder / "engines" / target.name / f"{which}{_backend(target).SUFFIX}"


def files(path: Path, target: Target) -> list[Path]:
    """The files that `build` wrote for the engine file `path`: the file, its record and its weights, if any."""
    return _backend(target).files(path)


def versions(target: Target) -> dict[str, str]:
    """Versions that an engine of this target depends on."""
    return _backend(target).versions(target)


def unavailable(target: Target) -> str | None:
    """The reason why engines of this target can be built but not run on this machine; None if they can run."""
    return _backend(target).unavailable(target)


def lacks(target: Target, precision: str) -> str | None:
    """The reason why this machine cannot run engines of this target in a precision; None if it can."""
    backend = _backend(target)
    reason: str | None = backend.lacks(precision) if hasattr(backend, "lacks") else None
    return reason


def gpu_name() -> str | None:
    """Name and compute capability of this machine's first GPU; None without a working GPU."""
    from optin_export.engines import _device

    return _device.gpu_name()


def _backend(target: Target) -> Any:
    # TensorRT and TensorRT for RTX are one backend.
    return importlib.import_module(f"{__name__}.{target.engine.partition('-')[0]}")
