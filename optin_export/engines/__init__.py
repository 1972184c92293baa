"""engines: an ONNX file and a target become an engine with `run`. Knows nothing of pruning. One file per kind.

An engine file offers `suffix`, `build(onnx, target, path)` and `load(path, target)`; it is found by the target's name.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from optin_export.recipe import Target

__all__ = ["Engine", "artefact", "build", "load", "versions"]

Arrays = dict[str, np.ndarray]


class Engine(Protocol):
    """A loaded engine. Inputs and outputs are numpy arrays by name; the first dimension is the batch."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def run(self, inputs: Mapping[str, np.ndarray]) -> Arrays: ...


def build(onnx: Path, target: Target, path: Path) -> dict[str, Any]:
    """Build the engine file `path` from `onnx` for `target`; returns facts about it.

    Raises EnvironmentLacks when the library of the target is missing, ParityError when it refuses the graph.
    """
    return _backend(target).build(onnx, target, path)


def load(path: Path, target: Target) -> Engine:
    """Load an engine file that `build` wrote."""
    return _backend(target).load(path, target)


def artefact(folder: Path, target: Target, which: str) -> Path:
    """Where the engine of the 'base' or 'pruned' model lies below a run folder."""
    return folder / "engines" / target.name / f"{which}{_backend(target).SUFFIX}"


def versions(target: Target) -> dict[str, str]:
    """Versions that an engine of this target depends on."""
    return _backend(target).versions()


def _backend(target: Target) -> Any:
    return importlib.import_module(f"{__name__}.{target.engine.replace('-', '_')}")
