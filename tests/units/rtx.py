"""TensorRT for RTX parses ONNX files and builds engines without a GPU; running them needs one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

Shape = tuple[int, ...]


def build(path: Path, shapes: dict[str, tuple[Shape, Shape, Shape]]) -> bytes:
    """The engine of an ONNX file for one profile of input shapes (min, opt, max); AssertionError with every reason."""
    import tensorrt_rtx as trt

    messages: list[str] = []

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()

        def log(self, severity: Any, text: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                messages.append(text)

    log = Log()
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse(path.read_bytes()):
        raise AssertionError("; ".join(parser.get_error(index).desc() for index in range(parser.num_errors)))
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    profile = builder.create_optimization_profile()
    for name, (least, best, most) in shapes.items():
        profile.set_shape(name, least, best, most)
    config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    assert engine is not None and not messages, "; ".join(messages)
    return bytes(engine)
