"""A stand-in for the library `tensorrt`, where none can run: an engine that computes relu(x) on the host, behind the
names that Polygraphy's runner and this package call. What it is called with is recorded in `calls`.

It is asked for more than one real thing would be: shapes outside the chosen profile, and pointers that were never set,
are errors.
"""

from __future__ import annotations

import ctypes
import enum
import importlib.machinery
import math
import types
from typing import Any

import numpy as np


class TensorIOMode(enum.Enum):
    INPUT, OUTPUT = range(2)


class TensorFormat(enum.Enum):
    LINEAR, HWC, CHW16 = range(3)


class DataType(enum.Enum):
    FLOAT, HALF, INT32, INT8 = range(4)


class IDebugListener:
    pass


class IOutputAllocator:
    pass


class ILogger:
    pass


class IExecutionContext:
    def __init__(self, engine: ICudaEngine) -> None:
        self.engine, self.active_optimization_profile = engine, 0
        self._shape: tuple[int, ...] | None = None
        self._addresses: dict[str, int] = {}
        self._allocator: Any = None

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self.engine.calls.append(f"profile {index}")
        self.active_optimization_profile, self._shape = index, None
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        least, _, most = self.engine.profiles[self.active_optimization_profile]
        assert name == "x" and all(a <= b <= c for a, b, c in zip(least, shape, most, strict=True)), shape
        self._shape = tuple(shape)
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self._shape or (-1, self.engine.width)

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[name] = address
        return True

    def get_tensor_address(self, name: str) -> int:
        return self._addresses.get(name, 0)

    def set_output_allocator(self, name: str, allocator: Any) -> bool:
        self._allocator = allocator
        return True

    def execute_async_v3(self, stream: int) -> bool:
        assert self._shape is not None
        count = math.prod(self._shape)
        if self._allocator is not None:
            self._allocator.notify_shape("y", self._shape)
            self._addresses["y"] = self._allocator.reallocate_output_async("y", 0, 4 * count, 256, stream)
        x, y = (
            np.ctypeslib.as_array(ctypes.cast(self._addresses[name], ctypes.POINTER(ctypes.c_float)), (count,))
            for name in ("x", "y")
        )
        y[:] = np.maximum(x, 0) + self.engine.wrong * (self._allocator is None)
        self.engine.calls.append(f"run {self._shape[0]}")
        return True


class ICudaEngine:
    """profiles: (min, opt, max) of x. wrong: what calls without Polygraphy's runner add to the output."""

    def __init__(self, profiles: list[tuple[tuple[int, ...], ...]], wrong: float = 0.0) -> None:
        self.profiles, self.wrong, self.width = profiles, wrong, profiles[0][0][1]
        self.num_io_tensors, self.num_optimization_profiles = 2, len(profiles)
        self.calls: list[str] = []

    def create_execution_context(self) -> IExecutionContext:
        self.calls.append("context")
        return IExecutionContext(self)

    def get_tensor_name(self, index: int) -> str:
        return "xy"[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name == "x" else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> DataType:
        return DataType.FLOAT

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (-1, self.width)

    def get_tensor_format(self, name: str, profile: int) -> TensorFormat:
        return TensorFormat.LINEAR

    def is_shape_inference_io(self, name: str) -> bool:
        return False

    def get_tensor_profile_shape(self, name: str, index: int) -> list[list[int]]:
        return [list(dims) for dims in self.profiles[index]]

    def get_device_memory_size_for_profile_v2(self, index: int) -> int:
        return 1000 * (index + 1)


class HostCuda:
    """The calls of Polygraphy's wrapper around libcudart, on host memory."""

    def __init__(self) -> None:
        self._held: dict[int, Any] = {}

    def create_stream(self) -> int:
        return 0

    def stream_synchronize(self, ptr: int) -> None: ...

    def destroy_stream(self, ptr: int) -> None: ...

    def malloc(self, nbytes: int) -> int:
        buffer = ctypes.create_string_buffer(max(nbytes, 1))
        self._held[ctypes.addressof(buffer)] = buffer
        return ctypes.addressof(buffer)

    def free(self, ptr: int) -> None:
        self._held.pop(ptr, None)  # as cudaFree, which takes 0

    def memcpy(self, dst: int, src: int, nbytes: int, kind: Any, stream_ptr: int | None = None) -> None:
        ctypes.memmove(dst, src, nbytes)


def module() -> types.ModuleType:
    """The library as a module, which is named and versioned like a real one."""
    found = types.ModuleType("tensorrt")
    found.__spec__ = importlib.machinery.ModuleSpec("tensorrt", None)
    vars(found).update(
        {name: kind for name, kind in globals().items() if isinstance(kind, type) and name != "HostCuda"},
        __version__="10.16.1.11",
        float32=DataType.FLOAT,
        float16=DataType.HALF,
        int32=DataType.INT32,
        int8=DataType.INT8,
    )
    return found
