"""TensorRT for RTX parses ONNX files and builds engines without a GPU; running them needs one."""

from __future__ import annotations

import logging
from pathlib import Path

from optin_export.engines import _tensorrt_network as network
from optin_export.engines._polygraphy import polygraphy_of
from optin_export.recipe import Target

Shape = tuple[int, ...]
#: An engine for a GPU that is not here.
TARGET = Target.model_validate({"engine": "tensorrt-rtx", "tensorrt": {"compute_capabilities": ["8.9"]}})


def build(path: Path, shapes: dict[str, tuple[Shape, Shape, Shape]]) -> bytes:
    """The engine of an ONNX file for one profile of input shapes (min, opt, max), built as a run builds it; an error
    with every reason, also for one that the library reports without refusing."""
    import tensorrt_rtx

    messages: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    tools = polygraphy_of(tensorrt_rtx, "tests", "rtx")
    handler = Collector()
    logging.getLogger("Polygraphy").addHandler(handler)
    try:
        parsed = network.parse(tools, path)
        engine = network.engine_bytes(tools, parsed, network.configure(tools, TARGET, [shapes]), TARGET)
    finally:
        logging.getLogger("Polygraphy").removeHandler(handler)
    assert not messages, "; ".join(messages)
    return engine
