"""Latency on a GPU: every mode of calling the engine, its memory, and the GPU's state during the measurement.

Clocks, temperature and power are read between blocks with NVML and never set, so the log shows a GPU that slows down.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Protocol, runtime_checkable

import numpy as np

from optin_export.engines import Engine, modes
from optin_export.errors import EnvironmentLacks, OptinError
from optin_export.measure.latency import Latency, LatencySettings, Load, measure_latency
from optin_export.recipe import MODELS, engine_name


@runtime_checkable
class _KnowsMemory(Protocol):
    def memory(self, inputs: Mapping[str, np.ndarray]) -> dict[str, int]: ...


def measure_modes(
    base: Load,
    pruned: Load,
    inputs: Mapping[str, np.ndarray],
    settings: LatencySettings,
    plain: Mapping[str, Load] | None = None,
) -> list[Latency]:
    """One measurement per mode that the engines have; on the CPU that is one. See `measure_latency`.

    The mode of `settings` is the one that gates apply to. If it fails, that is an error; another mode that fails is
    recorded as unmeasured, with the reason. plain: the fp32 pair, measured in the same blocks, if the precision is
    another.
    """
    judged, (unpruned, smaller) = settings.mode, (engine_name(model, settings.precision) for model in MODELS)
    loads = {**(plain or {}), unpruned: base, smaller: pruned}
    engines = {name: load() for name, load in loads.items()}
    base_modes = modes(engines[unpruned])
    shared = [mode for mode in base_modes if all(mode in modes(engine) for engine in engines.values())]
    if judged not in shared:
        raise EnvironmentLacks(
            f"the engines cannot be timed in the mode {judged}", f"they have {', '.join(shared)}", "set targets.mode"
        )
    log = GpuLog() if len(shared) > 1 else None
    memory = {} if log is None else {name: memory_of(engine, inputs) for name, engine in engines.items()}
    del engines  # every measurement loads its own engines
    found: list[Latency] = []
    failed: dict[str, str] = {}
    measured = partial(measure_latency, base, pruned, inputs, plain=plain)
    for mode in shared:
        try:
            found.append(_measured(measured, replace(settings, mode=mode), log))
        except (OptinError, RuntimeError) as error:  # RuntimeError: libraries cannot capture a graph
            if mode == judged:
                raise
            failed[mode] = (error.why if isinstance(error, OptinError) else str(error).splitlines()[0])[:300]
    return [
        replace(one, judged=one.mode == judged, memory=memory, unmeasured=failed if one.mode == judged else {})
        for one in found
    ]


def memory_of(engine: Engine, inputs: Mapping[str, np.ndarray]) -> dict[str, int]:
    """GPU memory in bytes of the 'model' and its 'activations' for these inputs, as far as the engine reports it."""
    return engine.memory(inputs) if isinstance(engine, _KnowsMemory) else {}


def _measured(measured: Callable[..., Latency], settings: LatencySettings, log: GpuLog | None) -> Latency:
    """measured: `measure_latency` of these engines."""
    if log is None:
        return measured(settings)
    log.entries = []
    result = measured(settings, after_block=log.read)
    return replace(result, clocks=tuple(log.entries), clocks_note=log.note)


class GpuLog:
    """Readings of the first GPU, one for each block. note: the reason if there are no readings."""

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
        """The GPU that CUDA numbers first; NVML numbers all GPUs of the machine, including invisible ones."""
        import torch

        if torch.cuda.is_available():
            uuid = str(getattr(torch.cuda.get_device_properties(0), "uuid", ""))
            if uuid:
                return nvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
        return nvml.nvmlDeviceGetHandleByIndex(0)

    def read(self) -> None:
        """Append the GPU's current readings; values that it does not report are left out."""
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
    """Minimum and maximum of every reading."""
    names = dict.fromkeys(name for entry in clocks for name in entry)
    values = {name: [entry[name] for entry in clocks if name in entry] for name in names}
    return {name: (min(found), max(found)) for name, found in values.items()}


def driver_version() -> str | None:
    """The version of the NVIDIA driver; None without one, or without nvidia-ml-py."""
    try:
        import pynvml

        pynvml.nvmlInit()
        try:
            found = pynvml.nvmlSystemGetDriverVersion()
        finally:
            pynvml.nvmlShutdown()
    except Exception:  # no package, no driver, or one that does not answer
        return None
    return found.decode() if isinstance(found, bytes) else str(found)
