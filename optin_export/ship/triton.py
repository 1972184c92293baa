"""A Triton model repository for the onnxruntime backend, its config.pbtxt written through Triton's own protobuf."""

from __future__ import annotations

import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from optin_export.errors import EnvironmentLacks, InputError, missing_package

#: ONNX element types by Triton's names (model_config.proto, DataType).
_TYPES = {1: "TYPE_FP32", 6: "TYPE_INT32", 7: "TYPE_INT64", 10: "TYPE_FP16"}


def write_repository(onnx_file: Path, repository: Path, name: str, batches: tuple[int, ...]) -> Path:
    """Write `repository/name/{config.pbtxt,1/model.onnx}`; the model folder appears whole or not at all.

    batches: shipped batch sizes; the largest is max_batch_size, all above 1 are preferred by the dynamic batcher.
    Raises InputError for a name Triton would refuse, EnvironmentLacks if tritonclient is missing or the disk is full.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise InputError(f"'{name}' cannot name a Triton model", "use letters, digits, '.', '_' and '-'", "set name")
    text = config_text(onnx_file, name, batches)
    repository.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=repository, prefix=".staging-"))
    try:
        (staging / "1").mkdir()
        shutil.copyfile(onnx_file, staging / "1" / "model.onnx")
        (staging / "config.pbtxt").write_text(text, encoding="utf-8")
        staging.chmod(0o755)  # mkdtemp makes private folders; the server runs under another user
        final = repository / name
        if final.exists():
            old = Path(tempfile.mkdtemp(dir=repository, prefix=".old-"))
            final.rename(old / name)
            staging.rename(final)
            shutil.rmtree(old)
        else:
            staging.rename(final)
    except OSError as error:
        raise EnvironmentLacks(
            f"cannot write {repository / name}", error.strerror or str(error), "free disk space, or check permissions"
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return final


def check_tools() -> None:
    """Raises EnvironmentLacks if Triton's configuration cannot be written here."""
    _protobuf()


def _protobuf() -> tuple[Any, Any]:
    try:
        from google.protobuf import text_format
        from tritonclient.grpc import model_config_pb2
    except ImportError:
        raise missing_package("tritonclient", "ship: {triton: true}", "triton") from None
    return text_format, model_config_pb2


def config_text(onnx_file: Path, name: str, batches: tuple[int, ...]) -> str:
    """config.pbtxt for an ONNX file: names, types and dims are read from the graph itself."""
    import onnx

    text_format, model_config_pb2 = _protobuf()
    graph = onnx.load(onnx_file, load_external_data=False).graph
    config = model_config_pb2.ModelConfig()
    config.name = name
    config.backend = "onnxruntime"
    config.max_batch_size = max(batches)
    for values, entries in ((graph.input, config.input), (graph.output, config.output)):
        for value in values:
            entry = entries.add()
            entry.name = value.name
            entry.data_type = model_config_pb2.DataType.Value(_TYPES[value.type.tensor_type.elem_type])
            # Triton adds the batch dimension itself when max_batch_size > 0; -1 is a dynamic dimension.
            entry.dims.extend(_dims(value)[1:])
    preferred = sorted(size for size in batches if size > 1)
    if preferred:
        config.dynamic_batching.preferred_batch_size.extend(preferred)
        config.dynamic_batching.max_queue_delay_microseconds = 100
    config.instance_group.add(count=1, kind=model_config_pb2.ModelInstanceGroup.KIND_CPU)
    return text_format.MessageToString(config)


def _dims(value: Any) -> list[int]:
    return [dim.dim_value if dim.HasField("dim_value") else -1 for dim in value.type.tensor_type.shape.dim]
