"""Find the server image with the library version with which an engine or graph was measured.

onnxruntime: the table "ONNX Runtime Versions" of docs/introduction/compatibility.md in triton-inference-server/server
(state of release 26.08). TensorRT: that page gives versions only for the trtllm images, which do not have the tensorrt
backend, so there is no reliable table here; NVIDIA's support matrix names the release.
"""

from __future__ import annotations

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


def server_image(backend: str, library: str, version: str | None) -> str:
    """One line: the image whose library has that version, or, if unknown, where to find it."""
    if version is None:
        return f"unknown: the run does not say which {library} it was measured with"
    if backend == "python":
        newest = next(iter(ONNXRUNTIME))
        packages = f"{library} and torch" if library.startswith("tensorrt") else library
        return f"{IMAGE}:{newest}-py3 with `pip install {packages}=={version}` in it (python backend)"
    if library == "openvino":
        return f"unknown: {IMAGE}:YY.MM-py3 whose OpenVINO is {version} or newer; it reads graphs of older versions"
    if library != "onnxruntime":
        return f"unknown: look for TensorRT {version} in {SUPPORT_MATRIX} and take {IMAGE}:YY.MM-py3 of that release"
    tag = next((release for release, holds in ONNXRUNTIME.items() if holds == version), None)
    if tag is not None:
        return f"{IMAGE}:{tag}-py3 (holds onnxruntime {version})"
    newest, holds = next(iter(ONNXRUNTIME.items()))
    return (
        f"unknown: no release up to {newest} holds onnxruntime {version}; the newest known, {IMAGE}:{newest}-py3, "
        f"holds {holds}: measure again there before you rely on these numbers"
    )


def docker_line(repository: str, tag: str, gpu: bool) -> str:
    """The command that serves a repository on a host with Docker."""
    gpus = "--gpus=all " if gpu else ""
    ports = " ".join(f"-p127.0.0.1:{port}:{port}" for port in (8000, 8001, 8002))
    return f"docker run --rm {gpus}{ports} -v {repository}:/models:ro {tag} tritonserver --model-repository=/models"
