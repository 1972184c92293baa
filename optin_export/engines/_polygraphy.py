"""Polygraphy, NVIDIA's package around TensorRT and TensorRT for RTX: it parses, configures, builds, loads and runs.

It chooses one of the two libraries when it is imported, so each library gets an import of its own.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from optin_export.environment import variable
from optin_export.errors import OptinError, missing_package

_LOG = "Polygraphy"


@dataclass(frozen=True)
class Polygraphy:
    """Polygraphy for the library `trt`.

    backend: polygraphy.backend.trt. create_config: the loader of a builder's configuration.
    """

    trt: Any
    backend: Any
    create_config: Any

    @property
    def is_rtx(self) -> bool:
        return bool(self.trt.__name__ == "tensorrt_rtx")


class Reasons(list[str]):
    """What the library reported as errors, which contain the reason for a failure."""

    def last(self) -> str:
        """The reason in one line."""
        return "; ".join(self[-3:])[:400] or "it gave no reason"


def polygraphy_of(trt: Any, needed_for: str, extra: str) -> Polygraphy:
    """Polygraphy for the library module `trt`. Raises EnvironmentLacks without the package.

    needed_for: the field of the recipe that asks for it. extra: this package's extra that installs it.
    """
    try:
        return _imported(trt)
    except ImportError as error:
        if error.name is not None and error.name.partition(".")[0] == "polygraphy":
            raise missing_package("polygraphy", needed_for, extra) from None
        raise


@functools.cache
def _imported(trt: Any) -> Polygraphy:
    others = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == "polygraphy"}
    try:
        is_rtx = trt.__name__ == "tensorrt_rtx"
        importlib.import_module("polygraphy.config").USE_TENSORRT_RTX = is_rtx  # type: ignore[attr-defined]
        logger: Any = importlib.import_module("polygraphy.logger").G_LOGGER
        logger.use_python_logging_system, logger.colors, logger.letter = True, False, False
        logger.module_severity = logger.ERROR
        backend: Any = importlib.import_module("polygraphy.backend.trt")
        rtx: Any = importlib.import_module("polygraphy.backend.tensorrt_rtx")
        create = rtx.CreateConfigRTX if is_rtx else functools.partial(backend.CreateConfig, tf32=True)
        return Polygraphy(trt, backend, create)
    finally:
        if others:  # an import by the caller's own code, or for the other library
            for name in [name for name in sys.modules if name.partition(".")[0] == "polygraphy"]:
                del sys.modules[name]
            sys.modules.update(others)


@contextlib.contextmanager
def reasons() -> Iterator[Reasons]:
    """Collect what the library reports as errors in the body, instead of printing it."""
    found, log = Reasons(), logging.getLogger(_LOG)

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.levelno == logging.ERROR:  # above it is Polygraphy's own summary
                found.append(record.getMessage())

    handler, propagated = Collector(), log.propagate
    log.addHandler(handler)
    log.propagate = False
    try:
        yield found
    finally:
        log.removeHandler(handler)
        log.propagate = propagated


@contextlib.contextmanager
def explained(error_of: Callable[[Reasons], OptinError]) -> Iterator[Reasons]:
    """Turn what Polygraphy raises in the body into the error that `error_of` makes from the reasons."""
    with reasons() as found:
        try:
            yield found
        except Exception as error:
            # By name: Polygraphy imports its exception again at every failure, for either library.
            if type(error).__name__ != "PolygraphyException":
                raise
            if not found:
                found.append(str(error))
            raise error_of(found) from None


@contextlib.contextmanager
def cuda_runtime() -> Iterator[None]:
    """Let Polygraphy find torch's own CUDA runtime, which it would not find in the wheels of CUDA 13."""
    folder = _runtime_folder()
    if folder is None:
        yield
        return
    with variable("LD_LIBRARY_PATH", os.pathsep.join(filter(None, (str(folder), os.environ.get("LD_LIBRARY_PATH"))))):
        yield


def _runtime_folder() -> Path | None:
    """The folder of the wheel's libcudart that torch uses; None if torch was not installed from such wheels."""
    site = Path(torch.__file__).parents[1]
    major = (torch.version.cuda or "0").partition(".")[0]
    for folder in (site / "nvidia" / f"cu{major}" / "lib", site / "nvidia" / "cuda_runtime" / "lib"):
        if any(folder.glob("libcudart.so*")):
            return folder
    return None
