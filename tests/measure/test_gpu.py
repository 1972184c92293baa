"""Every way of calling an engine is measured, one is judged, and what the GPU did meanwhile is written down."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from types import SimpleNamespace

import numpy as np
import pytest

from optin_export.engines import CALL, MODES
from optin_export.errors import EnvironmentLacks
from optin_export.measure import Latency, LatencySettings, Measured, ParityCase, gpu, judge, latency
from optin_export.recipe import Budget, Gates

X = {"x": np.ones((2, 3), np.float32)}


def settings(judged: str = CALL) -> LatencySettings:
    return LatencySettings("torch-cuda", 2, None, 0, judged)


class OnGpu:
    """Takes `ms` for a call; without copies half of it, without launches a quarter, and has no graph with copies."""

    inputs, outputs, modes = ("x",), ("y",), tuple(MODES)

    def __init__(self, ms: float) -> None:
        self.ms = ms

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"y": inputs["x"]}

    def timer(self, inputs: Mapping[str, np.ndarray], mode: str) -> Callable[[], float]:
        if mode == "call+graph":
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        return lambda: self.ms / {"call": 1, "device": 2, "device+graph": 4}[mode]

    def memory(self, inputs: Mapping[str, np.ndarray]) -> dict[str, int]:
        return {"model": int(1000 * self.ms), "activations": 7}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "WARM_UP_SECONDS", 0.0)
    monkeypatch.setattr(latency, "PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(latency.Watch, "seen", lambda watch: None)


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """An NVML whose clock falls by one at every reading, and which does not tell the power."""

    class NVMLError(Exception): ...

    def refuse(handle: object) -> int:
        raise NVMLError("Not Supported")

    clocks = iter(range(2000, 0, -1))
    fake = SimpleNamespace(
        NVMLError=NVMLError,
        NVML_CLOCK_SM=1,
        NVML_CLOCK_MEM=2,
        NVML_TEMPERATURE_GPU=0,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByIndex=lambda index: "gpu",
        nvmlDeviceGetHandleByUUID=lambda uuid: "gpu",
        nvmlDeviceGetClockInfo=lambda handle, kind: next(clocks) if kind == 1 else 9000,
        nvmlDeviceGetTemperature=lambda handle, sensor: 55,
        nvmlDeviceGetPowerUsage=refuse,
        nvmlDeviceGetCurrentClocksThrottleReasons=lambda handle: 0,
    )
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    return fake


def test_every_mode_is_measured_and_one_is_judged(nvml: SimpleNamespace) -> None:
    found = gpu.measure_modes(lambda: OnGpu(40.0), lambda: OnGpu(10.0), X, settings("device"))
    assert [one.mode for one in found] == [CALL, "device", "device+graph"]
    assert [one.base_ms.p50 for one in found] == [40.0, 20.0, 10.0]
    judged = found[1]
    assert [one.judged for one in found] == [False, True, False]
    assert judged.unmeasured == {"call+graph": "operation not permitted when stream is capturing"}
    assert judged.memory == {
        "base": {"model": 40000, "activations": 7},
        "pruned": {"model": 10000, "activations": 7},
    }
    assert len(judged.clocks) == judged.blocks and judged.clocks_note is None
    ranges = gpu.ranges(judged.clocks)
    assert ranges["sm_mhz"] == (2000 - 2 * judged.blocks + 1, 2000 - judged.blocks)
    assert "watts" not in ranges and ranges["celsius"] == (55, 55)
    assert Latency.from_json(judged.to_json()) == judged


def test_a_judged_mode_that_fails_is_an_error(nvml: SimpleNamespace) -> None:
    with pytest.raises(RuntimeError, match="capturing"):
        gpu.measure_modes(lambda: OnGpu(40.0), lambda: OnGpu(10.0), X, settings("call+graph"))


def test_a_mode_that_the_engine_has_not_is_named() -> None:
    host = OnGpu(1.0)
    host.modes = (CALL,)
    with pytest.raises(EnvironmentLacks, match=r"cannot be timed in the mode device\+graph"):
        gpu.measure_modes(lambda: host, lambda: host, X, settings("device+graph"))
    only = gpu.measure_modes(lambda: host, lambda: host, X, settings())
    assert [(one.mode, one.judged, one.memory, one.clocks) for one in only] == [(CALL, True, {}, ())]


def test_the_gate_takes_the_judged_mode_only(nvml: SimpleNamespace) -> None:
    found = gpu.measure_modes(lambda: OnGpu(40.0), lambda: OnGpu(10.0), X, settings())
    slow = [
        one
        for one in gpu.measure_modes(lambda: OnGpu(10.0), lambda: OnGpu(10.0), X, settings("device"))
        if not one.judged
    ]
    good = ParityCase("torch-cuda", "base", 2, "distinct", 1e-6, 0.0, True)
    measured = Measured((good,), None, (*slow, *found))
    gates = {gate.name: gate for gate in judge(Gates(speedup=3.9), Budget(macs=0.5), 0.5, measured)}
    assert gates["speedup"].passed and gates["speedup"].measured == pytest.approx(4.0)


def test_without_nvml_the_log_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    log = gpu.GpuLog()
    log.read()
    assert log.entries == [] and "nvidia-ml-py is not installed" in (log.note or "")


def test_the_names_of_nvml_are_those_of_the_package(nvml: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "pynvml")
    real = pytest.importorskip("pynvml")
    assert [name for name in vars(nvml) if not hasattr(real, name)] == []
    log = gpu.GpuLog()
    log.read()
    assert bool(log.entries) == (log.note is None)
