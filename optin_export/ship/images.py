"""Find the server image with the library version with which an engine or graph was measured.

onnxruntime: the table "ONNX Runtime Versions" of docs/introduction/compatibility.md in triton-inference-server/server
(state of release 26.08). TensorRT: that page gives versions only for the trtllm images, which do not have the tensorrt
backend, so there is no reliable table here; NVIDIA's support matrix names the release.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

IMAGE = "nvcr.io/nvidia/tritonserver"
SUPPORT_MATRIX = "https://docs.nvidia.com/deeplearning/frameworks/support-matrix/index.html"
#: Triton release -> onnxruntime, newest first.
ONNXRUNTIME = {
    "26.08": "1.28.0",
    "26.07": "1.27.0",
    "26.06": "1.24.4",
    "26.05": "1.24.4",
    "26.04": "1.24.4",
    "26.03": "1.24.2",
    "26.02": "1.24.1",
    "26.01": "1.23.2",
    "25.12": "1.23.2",
    "25.11": "1.23.2",
    "25.10": "1.23.1",
    "25.09": "1.23.0",
    "25.07": "1.22.0",
    "25.06": "1.22.0",
    "25.05": "1.22.0",
    "25.04": "1.21.0",
    "25.03": "1.21.0",
    "25.02": "1.20.1",
    "25.01": "1.20.1",
}


@dataclass(frozen=True)
class Image:
    """A server image. tag: with repository and release. packages: what its Python needs for the shipped models, as pip
    takes them. exact: whether it is known to have the library that was measured. note: one sentence on its library."""

    tag: str
    note: str
    exact: bool
    packages: tuple[str, ...] = ()

    def __str__(self) -> str:
        also = f", with `pip install {' '.join(self.packages)}` in it" if self.packages else ""
        return f"{self.tag}{also} ({self.note})"


def server_image(backend: str, library: str, version: str | None, packages: Sequence[str] = ()) -> Image:
    """The release whose library has that version; else the oldest with a newer one, or the newest known.

    packages: what the preparation of inputs needs in the server's Python.
    """
    newest = next(iter(ONNXRUNTIME))
    latest = f"{IMAGE}:{newest}-py3"
    if version is None:
        return Image(
            latest, f"newest known: the run does not say which {library} it was measured with", False, tuple(packages)
        )
    if backend == "python":
        own = [f"{library}=={version}"] + ["torch"] * library.startswith("tensorrt")
        return Image(latest, "newest known", True, (*own, *packages))
    if library == "openvino":
        note = f"newest known: its OpenVINO must be {version} or newer, which reads graphs of older versions"
        return Image(latest, note, False, tuple(packages))
    if library != "onnxruntime":
        note = (
            f"newest known: it loads the engine only if its TensorRT is {version}; look for the release that has it in "
            f"{SUPPORT_MATRIX}"
        )
        return Image(latest, note, False, tuple(packages))
    tag = next((release for release, has in ONNXRUNTIME.items() if has == version), None)
    if tag is not None:
        return Image(f"{IMAGE}:{tag}-py3", f"has onnxruntime {version}, as measured", True, tuple(packages))
    newer = [release for release, has in ONNXRUNTIME.items() if _numbers(has) > _numbers(version)]
    release = newer[-1] if newer else newest
    which = "the next known release" if newer else "the newest known release"
    note = (
        f"{which}: has onnxruntime {ONNXRUNTIME[release]}, the run was measured with {version}; measure again there "
        "before you rely on these numbers"
    )
    return Image(f"{IMAGE}:{release}-py3", note, False, tuple(packages))


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


def docker_line(repository: str, image: Image, gpu: bool, arguments: Sequence[str] = ()) -> str:
    """The command that serves a repository on a host with Docker; it installs what the server's Python lacks.

    repository: a folder of the host, or a URL that the server reads by itself. arguments: more flags of tritonserver.
    """
    gpus = "--gpus=all " if gpu else ""
    ports = " ".join(f"-p127.0.0.1:{port}:{port}" for port in (8000, 8001, 8002))
    remote = "://" in repository
    place = repository if remote else "/models"
    server = " ".join([f"tritonserver --model-repository={place}", *arguments])
    if image.packages:
        install = f"pip install {' '.join(image.packages)} && exec {server}"
        server = f"bash -c {shlex.quote(install)}"
    mount = "" if remote else f"-v {shlex.quote(f'{repository}:/models:ro')} "
    return f"docker run --rm {gpus}{ports} {mount}{image.tag} {server}"
