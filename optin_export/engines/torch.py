"""torch as an engine, on the CPU or a GPU, so that every machine can measure. The engine is an exported program
(`torch.export`, a .pt2 file) of graph and weights, which runs without this package and the model's source."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from optin_export.engines import CALL, MODES, Timer
from optin_export.engines import _device as devices
from optin_export.engines._device import Launch, Tensors
from optin_export.environment import variable
from optin_export.errors import EnvironmentLacks, ParityError
from optin_export.recipe import Target
from optin_export.workdir.files import atomic_path

SOURCE = SUFFIX = ".pt2"
#: Targets that a program's node may call, and files that a program may hold: for other objects torch reads pickles.
_TENSOR = r"(weight|tensor)_\d+"
_OPERATOR = r"torch\.ops(\.[A-Za-z_]\w*)+|_operator\.[a-z]\w*|math\.[a-z]\w*|torch\._?sym_\w+"


class TorchEngine:
    """An exported program on a device; `run` takes and returns numpy arrays by name, copies included."""

    def __init__(self, module: Any, inputs: Sequence[str], outputs: Sequence[str], target: Target) -> None:
        self.inputs, self.outputs = tuple(inputs), tuple(outputs)
        self.modes = tuple(MODES) if target.device == "cuda" else (CALL,)
        self._module, self._threads = module, target.threads if target.device == "cpu" else None
        self._device = devices.device_of(target)

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        with _threads(self._threads):
            return devices.run(self._bind, self._named(inputs), self._device)

    def timer(self, inputs: Mapping[str, np.ndarray], mode: str) -> Timer:
        once = devices.timer(self._bind, self._named(inputs), mode, self._device)

        def timed() -> float:
            with _threads(self._threads):  # not timed
                return once()

        return timed

    def memory(self, inputs: Mapping[str, np.ndarray]) -> dict[str, int]:
        """Bytes on the GPU: weights, and the peak of all other memory during a call."""
        torch.cuda.synchronize()
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        self.run(inputs)
        weights = [*self._module.parameters(), *self._module.buffers()]
        return {
            "model": sum(tensor.nbytes for tensor in weights),
            "activations": torch.cuda.max_memory_allocated() - held,
        }

    def _named(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {name: inputs[name] for name in self.inputs}

    def _bind(self, held: Tensors, graph: bool) -> Launch:
        def launch() -> Tensors:
            with torch.no_grad():
                return {self.outputs[0]: self._module(**held)}

        return self._device.captured(launch) if graph else launch


def build(source: Path, target: Target, path: Path, shapes: Sequence[Mapping[str, tuple[int, ...]]]) -> dict[str, Any]:
    """Check that `source` is a program, and copy it as the engine; it is prepared for a device when it loads.

    Raises ParityError if torch cannot read it.
    """
    program, _ = _read(source)
    with atomic_path(path) as temporary:
        shutil.copyfile(source, temporary)
    compiled = {"compile": True} if target.compile else {}
    return {"bytes": path.stat().st_size, "nodes": len(program.graph.nodes), **versions(target), **compiled}


def load(path: Path, target: Target) -> TorchEngine:
    """Load a program onto the target's device; if the target says so, it is compiled at the first call of each shape.

    Raises EnvironmentLacks if the device does not exist or has too little memory.
    """
    reason = unavailable(target)
    if reason is not None:
        raise EnvironmentLacks(f"cannot run {path.name} here", reason, "run it on a machine with an NVIDIA GPU")
    program, names = _read(path)
    try:
        if target.device == "cuda":
            from torch.export.passes import move_to_device_pass

            program = move_to_device_pass(program, "cuda")
        module: Any = program.module()
    except torch.OutOfMemoryError as error:
        raise EnvironmentLacks(
            f"{path.name} does not fit on the GPU", str(error), "free memory, or lower export.batch"
        ) from None
    if target.compile:
        # One graph per shape, like CUDA graphs and the static profiles of other engines.
        module = torch.compile(module, dynamic=False)
    return TorchEngine(module, *names, target)


def versions(target: Target) -> dict[str, str]:
    gpu = {"gpu": name} if target.device == "cuda" and (name := devices.gpu_name()) else {}
    return {"torch": torch.__version__, **gpu}


def files(path: Path) -> list[Path]:
    return [path]


def unavailable(target: Target) -> str | None:
    return devices.no_gpu() if target.device == "cuda" else None


def _read(path: Path) -> tuple[torch.export.ExportedProgram, tuple[tuple[str, ...], tuple[str, ...]]]:
    """The program, and the names of its inputs and outputs."""
    names: dict[str, Any] = {"outputs": ""}
    try:
        check_program(path)
        with _plain_pickles():
            program = torch.export.load(path, extra_files=names)
    except Exception as error:  # zip, JSON and torch's own exceptions
        why = next(iter(str(error).splitlines()), type(error).__name__)[:300]
        raise ParityError(f"torch cannot load {path.name}", why, "export again with this version of torch") from error
    outputs = names["outputs"]
    outputs = outputs.decode() if isinstance(outputs, bytes) else outputs
    return program, (program.graph_signature.user_inputs, tuple(outputs.split()))


def check_program(path: Path) -> None:
    """Check that a program calls only torch operators: torch.export resolves targets by any dotted name below `torch`,
    including modules such as `os`. Raises ValueError, or what a damaged archive raises."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if sum(entry.file_size for entry in entries) > path.stat().st_size + (1 << 20):
            raise ValueError("the archive is compressed, which torch's archives are not")
        for entry in entries:
            if not entry.filename.lower().endswith(".json"):
                continue
            waiting = [json.loads(archive.read(entry))]
            while waiting:
                value = waiting.pop()
                if isinstance(value, dict):
                    target = value.get("target")
                    if isinstance(target, str) and not re.fullmatch(_OPERATOR, target):
                        raise ValueError(f"it calls '{target[:60]}', which is not an operator")
                    held = value.get("path_name")
                    if held is not None and not re.fullmatch(_TENSOR, str(held)):
                        raise ValueError(
                            f"it holds '{str(held)[:60]}', which is not a tensor: loading it could run code"
                        )
                    value = list(value.values())
                if isinstance(value, list):
                    waiting += value


@contextlib.contextmanager
def _plain_pickles() -> Iterator[None]:
    """Forbid unrestricted pickles, to which torch.export.load falls back, with torch's own switch."""
    with variable("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1"):
        yield


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Set torch's thread count, which is global to the process, for a call, and restore it."""
    before = torch.get_num_threads()
    if count is None or count == before:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
