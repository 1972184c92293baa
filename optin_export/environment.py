"""The machine and the package versions, recorded with every measurement."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

PACKAGES = (
    "torch",
    "torchvision",
    "transformers",
    "timm",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "onnxruntime-gpu",
    "openvino",
    "nncf",
    "tensorrt",
    "tensorrt-rtx-cu13",
    "torch-pruning",
    "numpy",
    "scipy",
    "safetensors",
)
#: The packages that take part in computing results: another version may give other numbers.
_COMPUTES = (
    "torch",
    "torchvision",
    "torch-pruning",
    "timm",
    "transformers",
    "scipy",
    "numpy",
    "onnx",
    "onnx-ir",
    "onnxscript",
    "onnxruntime",
    "onnxruntime-gpu",
)


def libraries() -> dict[str, str]:
    """Installed versions of every library that computes a stage's results, by package name."""
    return {name: version for name in _COMPUTES if (version := _version(name)) is not None}


def describe() -> dict[str, Any]:
    """Hardware, operating system and package versions, JSON-serialisable."""
    from optin_export import __version__

    return {
        "optin_export": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cpus": cores(),
        "memory_gib": round(memory()[0] / 2**30, 1),
        "packages": {name: version for name in PACKAGES if (version := _version(name)) is not None},
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def sums_of_int8_overflow() -> bool:
    """Whether this CPU adds products of uint8 and int8 in 16 bits, which overflow: x86 without VNNI or AMX.

    Its kernels for int8 (VPMADDUBSW) then clip sums of two products; weights of 7 bits avoid that.
    """
    flags = _x86_features()
    return bool(flags) and not any(flag in ("avx512_vnni", "avx_vnni", "amx_int8") for flag in flags)


def multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for products in bfloat16, and torch uses them: x86 with AVX-512 or AMX."""
    return any(flag in ("avx512_bf16", "amx_bf16") for flag in _x86_features())


def _x86_features() -> list[str]:
    """The features of an x86 processor as Linux names them; none on other processors and systems."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return []
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].split() for line in lines if line.startswith("flags"))
    except (OSError, StopIteration):
        return []


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown"


def cores() -> int | None:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def memory() -> tuple[int, int]:
    """The machine's total and available memory in bytes; zeros if the system does not report them."""
    try:
        found = psutil.virtual_memory()
    except OSError:
        return 0, 0
    return found.total, found.available


@contextlib.contextmanager
def variable(name: str, value: str) -> Iterator[None]:
    """Set an environment variable inside the context and restore it afterwards, also after an error."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
