"""What belongs to a latency on a GPU: every way of calling the engine, its memory, and what the GPU did meanwhile.

Clocks, temperature and power are read between blocks by NVML and never set: a GPU that slows down shows in the log.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import numpy as np

from optin_export.engines import CALL, Engine, modes
from optin_export.errors import EnvironmentLacks, OptinError
from optin_export.measure.latency import Latency, Load, measure_latency


@runtime_checkable
class _KnowsMemory(Protocol):
    def memory(self, inputs: Mapping[str, np.ndarray]) -> dict[str, int]: ...


def measure_modes(
    base: Load,
    pruned: Load,
    inputs: Mapping[str, np.ndarray],
    *,
    judged: str = CALL,
    plain: Mapping[str, Load] | None = None,
    **rest: Any,
) -> list[Latency]:
    """One measurement per mode that the engines have; on the CPU that is one. `rest`: as for `measure_latency`.

    judged: the mode that gates are about. One that fails is an error; another one is noted as unmeasured, with the
    reason, besides the judged mode. plain: the fp32 pair, measured in the same blocks, where `precision` is another.
    """
    precision = rest.get("precision", "fp32")
    suffix = "" if precision == "fp32" else f".{precision}"
    loads = {**(plain or {}), f"base{suffix}": base, f"pruned{suffix}": pruned}
    engines = {name: load() for name, load in loads.items()}
    base_modes = modes(engines[f"base{suffix}"])
    shared = [mode for mode in base_modes if all(mode in modes(engine) for engine in engines.values())]
    if judged not in shared:
        raise EnvironmentLacks(
            f"the engines cannot be timed in the mode {judged}", f"they have {', '.join(shared)}", "set targets.mode"
        )
    log = GpuLog() if len(shared) > 1 else None
    memory = {} if log is None else {name: memory_of(engine, inputs) for name, engine in engines.items()}
    del engines  # every measurement loads its own
    found: list[Latency] = []
    failed: dict[str, str] = {}
    for mode in shared:
        try:
            found.append(_measured(base, pruned, inputs, mode, log, plain, rest))
        except (OptinError, RuntimeError) as error:  # libraries report a graph that cannot be captured as the latter
            if mode == judged:
                raise
            failed[mode] = (error.why if isinstance(error, OptinError) else str(error).splitlines()[0])[:300]
    return [
        replace(one, judged=one.mode == judged, memory=memory, unmeasured=failed if one.mode == judged else {})
        for one in found
    ]


def memory_of(engine: Engine, inputs: Mapping[str, np.ndarray]) -> dict[str, int]:
    """Bytes on the GPU of the 'model' and of its 'activations' at these inputs, as far as the engine can tell."""
    return engine.memory(inputs) if isinstance(engine, _KnowsMemory) else {}


def _measured(
    base: Load,
    pruned: Load,
    inputs: Mapping[str, np.ndarray],
    mode: str,
    log: GpuLog | None,
    plain: Mapping[str, Load] | None,
    rest: Mapping[str, Any],
) -> Latency:
    more: dict[str, Any] = dict(rest) if plain is None else {**rest, "plain": plain}
    if log is None:
        return measure_latency(base, pruned, inputs, mode=mode, **more)

    log.entries = []
    result = measure_latency(base, pruned, inputs, mode=mode, after_block=log.read, **more)
    return replace(result, clocks=tuple(log.entries), clocks_note=log.note)


class GpuLog:
    """Readings of the first GPU, one for each block. note: why there are none, if there are none."""

    def __init__(self) -> None:
        self.entries: list[dict[str, float]] = []
        self.note: str | None = None
        self._handle: Any = None
        try:
            import pynvml

            self._nvml = pynvml
        except ImportError:
            self.note = "clocks were not logged: the package nvidia-ml-py is not installed"
            return
        try:
            pynvml.nvmlInit()
            self._handle = self._first(pynvml)
        except pynvml.NVMLError as error:
            self.note = f"clocks were not logged: {error}"

    @staticmethod
    def _first(nvml: Any) -> Any:
        """The GPU that CUDA counts as the first; NVML counts all that the machine has, whatever is visible."""
        import torch

        if torch.cuda.is_available():
            uuid = str(getattr(torch.cuda.get_device_properties(0), "uuid", ""))
            if uuid:
                return nvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
        return nvml.nvmlDeviceGetHandleByIndex(0)

    def read(self) -> None:
        """Append what the GPU does now; values that it does not tell are left out."""
        if self._handle is None:
            return
        nvml, handle = self._nvml, self._handle
        asked: dict[str, Callable[[], float]] = {
            "sm_mhz": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
            "memory_mhz": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM),
            "celsius": lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
            "watts": lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1000,
            "throttle_reasons": lambda: nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle),
        }
        entry = {}
        for name, ask in asked.items():
            try:
                entry[name] = float(ask())
            except nvml.NVMLError:
                continue
        self.entries.append(entry)


def ranges(clocks: tuple[dict[str, float], ...]) -> dict[str, tuple[float, float]]:
    """Lowest and highest of every reading."""
    names = dict.fromkeys(name for entry in clocks for name in entry)
    values = {name: [entry[name] for entry in clocks if name in entry] for name in names}
    return {name: (min(found), max(found)) for name, found in values.items()}
