"""A loaded TensorRT engine: Polygraphy's runner for its outputs, and calls that the clock can time."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from optin_export.engines import MODES, Timer
from optin_export.engines import _device as devices
from optin_export.engines import _tensorrt_shapes as shapes
from optin_export.engines._device import Launch, Tensors
from optin_export.engines._polygraphy import Polygraphy, cuda_runtime, explained
from optin_export.errors import EnvironmentLacks, ParityError

#: Difference of two calls of one engine, relative to the largest output, that is rounding.
ROUNDING = 1e-2


class TensorRTEngine:
    """An engine on the GPU; `run` takes and gives numpy arrays by name, copies included.

    A batch (or sequence) that does not fit a profile exactly is padded with zeros to the next one, and its output cut.
    Polygraphy's runner gives the outputs. The clock has calls of its own, on buffers that stay on the device and as
    CUDA graphs, which that runner cannot time; their outputs are compared with the runner's before they are timed.
    """

    modes = tuple(MODES)

    def __init__(self, tools: Polygraphy, engine: Any, size: int, axes: shapes.Axes, streams: bool = False) -> None:
        """size: bytes of the engine file. streams: whether weights may stay in host memory."""
        self._tools, self._engine, self._size, self._axes = tools, engine, size, axes
        self._device = devices.Gpu()
        # One context at a time: each holds the scratch memory of all profiles. -1: TensorRT chooses what to stream.
        self._runner = tools.backend.TrtRunner(engine, weight_streaming_budget=-1 if streams else None)
        self._activate()
        self._runner.weight_streaming_budget = None  # the engine keeps it, and takes no other while a context exists
        kinds = tools.trt.TensorIOMode
        given, returned = (
            tools.backend.util.get_metadata_from_engine(engine, self._runner.context, mode)
            for mode in (kinds.INPUT, kinds.OUTPUT)
        )
        self.inputs, self.outputs = tuple(given), tuple(returned)
        self._dtypes = {name: np.dtype(one.dtype.numpy()) for name, one in (*given.items(), *returned.items())}
        self._profiles = [
            {name: tuple(tuple(dims) for dims in engine.get_tensor_profile_shape(name, index)) for name in self.inputs}
            for index in range(engine.num_optimization_profiles)
        ]
        self._chosen = 0

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        number, fitted = self._fitted(inputs)
        self._activate()
        with explained(lambda found: ParityError("TensorRT did not run the engine", found.last(), "build it again")):
            if number != self._chosen:
                self._runner.set_profile(number)
                self._chosen = number
            results = self._runner.infer(fitted)
        given = {name: inputs[name].shape for name in self.inputs}
        # Copied: the runner writes the next outputs into the same memory.
        return {name: shapes.cut(array, self._axes[name], given).copy() for name, array in results.items()}

    def timer(self, inputs: Mapping[str, np.ndarray], mode: str) -> Timer:
        """Raises ParityError if the timed call does not give what `run` gives."""
        expected = self.run(inputs)
        _, fitted = self._fitted(inputs)
        self._deactivate()
        bind = self._binder()
        given = {name: inputs[name].shape for name in self.inputs}
        for name, array in devices.run(bind, fitted, self._device).items():
            if not _alike(shapes.cut(array, self._axes[name], given), expected[name]):
                raise ParityError(
                    f"the timed call gives another '{name}' than the engine's own runner",
                    "so its time would be that of something else",
                    "report it, with the run folder's measurements",
                )
        return devices.timer(bind, fitted, mode, self._device)

    def memory(self, inputs: Mapping[str, np.ndarray]) -> dict[str, int]:
        """Bytes on the GPU: the size of the engine file, and its scratch memory for the profile of `inputs`."""
        number, _ = self._fitted(inputs)
        scratch = self._engine.get_device_memory_size_for_profile_v2(number)
        return {"model": self._size, "activations": int(scratch)}

    def _fitted(self, inputs: Mapping[str, np.ndarray]) -> tuple[int, dict[str, np.ndarray]]:
        number, fitted = shapes.fitted(self._profiles, {name: inputs[name] for name in self.inputs})
        return number, {name: np.ascontiguousarray(array, self._dtypes[name]) for name, array in fitted.items()}

    def _activate(self) -> None:
        if self._runner.is_active:
            return
        with cuda_runtime(), explained(lambda found: _no_context(found.last())):
            try:
                self._runner.activate()
            except OSError as error:  # of the CUDA runtime
                raise _no_context(str(error)) from None
        self._chosen = 0

    def _deactivate(self) -> None:
        if self._runner.is_active:
            self._runner.deactivate()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # an engine that was never loaded, or the end of the process
            self._deactivate()

    def _binder(self) -> devices.Bind:
        """Calls on bound tensors, whose shapes are those of a profile, in an execution context of their own."""
        context = self._engine.create_execution_context()
        if context is None:
            raise _no_context("there is not enough GPU memory")
        stream = self._device.stream_handle

        def bind(held: Tensors, graph: bool) -> Launch:
            empty = {name: np.empty(tuple(tensor.shape), np.bool_) for name, tensor in held.items()}
            number, _ = shapes.fitted(self._profiles, empty)

            def choose() -> None:
                if context.active_optimization_profile != number:
                    context.set_optimization_profile_async(number, stream)
                    self._device.wait()
                for name, tensor in held.items():
                    context.set_input_shape(name, tuple(tensor.shape))

            choose()
            outputs = {
                name: torch.empty(
                    tuple(context.get_tensor_shape(name)),
                    dtype=getattr(torch, self._dtypes[name].name),
                    device=self._device.name,
                )
                for name in self.outputs
            }

            def launch() -> Tensors:
                choose()
                for name, tensor in (*held.items(), *outputs.items()):
                    context.set_tensor_address(name, tensor.data_ptr())
                if not context.execute_async_v3(stream):
                    raise ParityError("TensorRT did not run the engine", "see its log", "build the engine again")
                return outputs

            return self._device.captured(launch) if graph else launch

        return bind


def _alike(found: np.ndarray, expected: np.ndarray) -> bool:
    """Equal up to the order of sums, which differs between calls of some kernels."""
    scale = float(np.abs(expected, dtype=np.float64).max(initial=0.0))
    return bool(np.allclose(found, expected, rtol=0.0, atol=ROUNDING * scale, equal_nan=True))


def _no_context(why: str) -> EnvironmentLacks:
    return EnvironmentLacks("failed to create the execution context", why, "free GPU memory, or lower export.batch")
