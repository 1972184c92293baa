"""Check what this machine can build and run, with the functions that a run calls."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from optin_export.environment import cores, memory
from optin_export.errors import EnvironmentLacks

State = Literal["ok", "warning", "missing", "unusable", "refused", "not checked"]
#: Resources that torch, its exporter and a small model need.
LEAST_MEMORY, LEAST_DISK = 2 * 2**30, 2 * 2**30
#: Checks of the default job: a small model on the CPU, with onnxruntime.
DEFAULT = ("python", "torch", "onnx", "engine onnxruntime, cpu", "memory", "disk")


#: Optional packages, and the modules that they install.
_PACKAGES = (
    ("nncf", "nncf"),
    ("datasets", "datasets"),
    ("model-signing", "model_signing"),
    ("ray", "ray"),
)


@dataclass(frozen=True)
class Check:
    """The check of one requirement of a run.

    state: missing: not installed; unusable: installed, but it does not work; refused: a run would refuse the recipe;
    not checked: the check needs a download. fix: what to do.
    """

    name: str
    state: State
    detail: str
    fix: str | None = None


def checks(folder: Path) -> Iterator[Check]:
    """All checks, in the order in which a run needs them. folder: where runs would be written."""
    version = ".".join(map(str, sys.version_info[:3]))
    yield Check("python", "ok" if sys.version_info >= (3, 11) else "unusable", version, "Python 3.11 or newer")
    yield from (_package(name) for name in ("torch", "transformers", "timm", "onnx"))
    yield Check("cores", "ok", f"{cores()}")
    yield _memory()
    yield _disk(folder)
    yield _gpu()
    yield _gpu_software()
    yield from engine_checks()
    yield _two_onnxruntimes()
    yield _tool("triton client", "tritonclient", _triton_client)
    yield _tool("triton server", None, _triton_server)
    yield from (_package(name, module) for name, module in _PACKAGES)
    offline = os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")
    yield Check("hub", "ok", "offline: HF_HUB_OFFLINE is set, only cached models load" if offline else "not contacted")


def engine_checks() -> Iterator[Check]:
    """One check for each kind of target, with the defaults of a recipe."""
    from optin_export.recipe import Target

    for given in (
        {},
        {"engine": "openvino"},
        {"device": "cuda"},
        {"device": "cuda", "provider": "tensorrt"},
        {"engine": "torch"},
        {"engine": "torch", "device": "cuda"},
        {"engine": "tensorrt"},
        {"engine": "tensorrt-rtx"},
    ):
        target = Target.model_validate(given)
        provider = f", {target.provider} provider" if target.provider != "cuda" else ""
        yield engine_check(target, f"engine {target.engine}, {target.device}{provider}")


def engine_check(target: object, name: str, precision: str = "fp32") -> Check:
    """Whether engines of a target can be built here in a precision (if not: missing) and run (if not: unusable)."""
    from optin_export import engines
    from optin_export.recipe import Target

    assert isinstance(target, Target)
    try:
        versions = ", ".join(f"{package} {version}" for package, version in engines.versions(target).items())
        reason = engines.unavailable(target)
        lacking = engines.lacks(target, precision)
    except EnvironmentLacks as error:
        return Check(name, "missing", error.why, error.fix)
    except Exception as error:  # a broken library can raise anything
        return Check(name, "unusable", _first_line(error), "reinstall it")
    if lacking is not None:
        return Check(name, "missing", f"{precision} needs another CPU: {lacking}", "set another export.precision")
    if reason is not None:
        return Check(
            name,
            "unusable",
            f"can be built, but not measured here ({versions}): {reason}",
            "measure on another machine",
        )
    return Check(name, "ok", versions)


def target_check(target: object, recipe: object) -> Check:
    """The check of one target of a recipe; for `engine: auto`, whether any of its engines can be taken."""
    from optin_export.recipe import Recipe, Target
    from optin_export.stages.choice import expanded

    assert isinstance(target, Target) and isinstance(recipe, Recipe)
    name = f"target {target.name}"
    if target.engine != "auto":
        return engine_check(target, name, recipe.export.precision)
    try:
        _, candidates = expanded(recipe)
    except EnvironmentLacks as error:
        return Check(name, "missing", error.why, error.fix)
    assert candidates is not None
    able = ", ".join(one.name for one in candidates.targets)
    return Check(name, "ok", "; not ".join([able, *(f"{one}: {why}" for one, why in candidates.refused.items())]))


def install_line(package: str) -> str:
    """The pip command that installs a package: the extra of optin-export that has it, if there is one."""
    try:
        wanted = metadata.requires("optin-export") or []
    except metadata.PackageNotFoundError:
        wanted = []
    for line in wanted:
        found = re.match(r"([A-Za-z0-9._-]+).*extra *== *['\"]([a-z]+)['\"]", line)
        if found and found[1].lower() == package and found[2] not in ("test", "train"):
            return f"pip install 'optin-export[{found[2]}]'"
    return f"pip install {package}"


def _package(name: str, module: str | None = None) -> Check:
    def look() -> str:
        importlib.import_module(module or name)
        return metadata.version(name)

    return _tool(name, name, look)


def _tool(name: str, package: str | None, look: Callable[[], str]) -> Check:
    fix = None if package is None else install_line(package)
    try:
        return Check(name, "ok", look())
    except EnvironmentLacks as error:
        return Check(name, "missing", error.why, fix or error.fix)
    except ModuleNotFoundError as error:
        return Check(name, "missing", f"the package {error.name} is not installed", fix)
    except metadata.PackageNotFoundError:
        return Check(name, "missing", "the package is not installed", fix)
    except Exception as error:  # a broken package can raise anything
        return Check(name, "unusable", _first_line(error), fix)


def _triton_client() -> str:
    from optin_export import ship

    ship.check_tools()
    return metadata.version("tritonclient")


def _triton_server() -> str:
    from optin_export.serving.server import find

    program = find()
    return f"{program.binary}, backends {', '.join(program.backends()) or 'none'}"


def _gpu() -> Check:
    from optin_export.engines import _device, gpu_name

    name = gpu_name()
    return Check("gpu", "ok", name) if name else Check("gpu", "missing", _device.no_gpu() or "none")


def _gpu_software() -> Check:
    from optin_export.cli import _gpu_software as software
    from optin_export.engines import gpu_name
    from optin_export.measure.gpu import driver_version

    name = gpu_name()
    if name is None:
        return Check("gpu software", "ok", software.RULES)
    able, detail, fix = software.advice(name, driver_version())
    return Check("gpu software", "ok" if able else "unusable", detail, fix)


def _two_onnxruntimes() -> Check:
    installed = []
    for name in ("onnxruntime", "onnxruntime-gpu"):
        try:
            installed.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    if len(installed) == 2:
        fix = "pip uninstall -y onnxruntime && pip install --force-reinstall onnxruntime-gpu"
        return Check("one onnxruntime", "unusable", f"{' and '.join(installed)} overwrite each other's files", fix)
    if not installed:
        return Check("one onnxruntime", "missing", "none", install_line("onnxruntime"))
    return Check("one onnxruntime", "ok", installed[0])


def _memory() -> Check:
    free = memory()[1]
    if not free:
        return Check("memory", "ok", "not known on this system")
    state: State = "ok" if free >= LEAST_MEMORY else "unusable"
    return Check("memory", state, f"{free / 2**30:.1f} GiB available", f"free at least {LEAST_MEMORY >> 30} GiB")


def _disk(folder: Path) -> Check:
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if not os.access(place, os.W_OK):
        return Check("disk", "unusable", f"{place} cannot be written", "choose another folder with --out")
    state: State = "ok" if free >= LEAST_DISK else "unusable"
    return Check("disk", state, f"{free / 2**30:.1f} GiB free in {place}", f"free at least {LEAST_DISK >> 30} GiB")


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"[:300]
