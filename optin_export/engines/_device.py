"""Calls on buffers that stay on a device, and the clocks that time them. The CPU is one of the devices, so that
everything but the GPU itself can be tested on a machine without one."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import numpy as np
import torch

from optin_export.engines import Timer
from optin_export.recipe import Target

Arrays = Mapping[str, np.ndarray]
Tensors = dict[str, torch.Tensor]
#: Starts one call on buffers that were bound before; its outputs, which the next call may overwrite.
Launch = Callable[[], Tensors]
#: (inputs on the device, whether to replay a CUDA graph) -> the call on them.
Bind = Callable[[Tensors, bool], Launch]

#: Maximum sets of inputs to rotate: inputs so small that they would need more hardly depend on the cache.
MOST_SETS = 16
#: Calls before a CUDA graph is captured, during which libraries allocate memory and choose their algorithms.
WARM_UP_CALLS = 3


class Device(Protocol):
    """A device on which an engine runs, with one stream and a clock."""

    name: str
    #: Cache size in bytes that the rotated inputs must exceed; 0: inputs are not rotated.
    cache_bytes: int

    #: CUDA's handle of the stream; 0 on the CPU.
    stream_handle: int

    def current(self) -> AbstractContextManager[object]:
        """Launch the body's work on the device's stream."""

    def wait(self) -> None:
        """Wait for all work on the stream."""

    def start(self) -> None: ...

    def stop(self) -> float:
        """Wait for the work launched since `start`; returns its duration in milliseconds."""

    def captured(self, launch: Launch) -> Launch:
        """The same call as a CUDA graph."""


class Host:
    """The CPU: a call returns when it is done, so the caller's clock measures all of it."""

    name, cache_bytes, stream_handle = "cpu", 0, 0

    def __init__(self) -> None:
        self._started = 0

    def current(self) -> AbstractContextManager[object]:
        return nullcontext()

    def wait(self) -> None:
        pass

    def start(self) -> None:
        self._started = time.perf_counter_ns()

    def stop(self) -> float:
        return (time.perf_counter_ns() - self._started) / 1e6

    def captured(self, launch: Launch) -> Launch:
        raise ValueError("a CUDA graph needs a GPU")


class Gpu:
    """The first NVIDIA GPU, one stream of its own, and CUDA events on it.

    The first event is recorded while the GPU waits, so that the host's following work (staging inputs, launching
    kernels) is part of the measured time, as it is for a caller.
    """

    name = "cuda"

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()
        self.stream_handle = self.stream.cuda_stream
        self.cache_bytes = int(getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 0))
        self._begin, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._pool: Any = None

    def current(self) -> AbstractContextManager[object]:
        return torch.cuda.stream(self.stream)

    def wait(self) -> None:
        self.stream.synchronize()

    def start(self) -> None:
        self.stream.synchronize()
        self._begin.record(self.stream)

    def stop(self) -> float:
        self._end.record(self.stream)
        self._end.synchronize()
        return float(self._begin.elapsed_time(self._end))

    def captured(self, launch: Launch) -> Launch:
        with self.current():
            for _ in range(WARM_UP_CALLS):
                launch()
        self.stream.synchronize()
        if self._pool is None:
            # Graphs that are replayed one after another may use the same memory.
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self.stream):
            outputs = launch()

        def replay() -> Tensors:
            graph.replay()
            return outputs

        return replay


def gpu_name() -> str | None:
    """Name and compute capability of the first GPU, e.g. 'NVIDIA L4 (sm89)'; None without a working driver."""
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability(0)
    return f"{torch.cuda.get_device_name(0)} (sm{major}{minor})"


def device_of(target: Target) -> Device:
    return Gpu() if target.device == "cuda" else Host()


def no_gpu() -> str | None:
    """The reason why nothing can run on a GPU here; None if a GPU is usable."""
    return None if gpu_name() is not None else "there is no NVIDIA GPU with a working driver"


def run(bind: Bind, inputs: Arrays, device: Device) -> dict[str, np.ndarray]:
    """One call with inputs and outputs in host memory."""
    with device.current():
        outputs = bind(_uploaded(inputs, device), False)()
        return {name: tensor.cpu().numpy() for name, tensor in outputs.items()}


def timer(bind: Bind, inputs: Arrays, mode: str, device: Device) -> Timer:
    """A timer of calls on `inputs` in one of `engines.MODES`. It rotates more copies of the inputs than the device's
    cache holds, because a caller's next inputs are not in the cache either."""
    copies, graph = mode.startswith("call"), mode.endswith("graph")
    host = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in inputs.items()}
    sets = [_uploaded(inputs, device) for _ in range(sets_of(inputs, device.cache_bytes))]
    with device.current():
        launches = [bind(held, graph) for held in sets]
    turns = itertools.cycle(zip(sets, launches, strict=True))

    def once() -> float:
        held, launch = next(turns)
        with device.current(), torch.no_grad():
            device.start()
            if copies:
                for name, tensor in held.items():
                    tensor.copy_(host[name], non_blocking=True)
            outputs = launch()
            if copies:
                for tensor in outputs.values():
                    tensor.cpu()
            return device.stop()

    return once


def sets_of(inputs: Arrays, cache_bytes: int) -> int:
    """The number of copies of the inputs that exceeds the cache."""
    size = sum(array.nbytes for array in inputs.values())
    return min(1 + math.ceil(cache_bytes / size), MOST_SETS) if cache_bytes else 1


def _uploaded(inputs: Arrays, device: Device) -> Tensors:
    with device.current():
        # Copies on the CPU as well: a bound buffer is never the caller's own memory.
        return {name: torch.tensor(np.ascontiguousarray(array), device=device.name) for name, array in inputs.items()}
