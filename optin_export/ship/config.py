"""config.pbtxt of one served model, written through Triton's own protobuf."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from optin_export.errors import InputError
from optin_export.ship.names import check_name
from optin_export.ship.own_config import merge
from optin_export.ship.protobuf import protobuf
from optin_export.ship.signature import Signature, Tensor

LABELS = "labels.txt"


@dataclass(frozen=True)
class Warmup:
    """One request that the server makes before a model is ready. files: input -> file in `warmup/` with one row, or
    with a whole batch if the server adds no batch dimension. name: default: by the batch."""

    batch: int
    files: Mapping[str, str]
    dims: Mapping[str, tuple[int, ...]]
    name: str = ""


@dataclass(frozen=True)
class ModelSpec:
    """The content of one model's config.pbtxt.

    batches: preferred sizes of the dynamic batcher, the largest is the maximum; empty: the server adds no batch
    dimension. versions: the numbered folders that are served; empty: the latest. labels: labels of the first output.
    own: the user's part of the file, merged last.
    """

    name: str
    backend: str
    signature: Signature
    batches: tuple[int, ...]
    file: str = ""
    device: str = "cpu"
    instances: int = 1
    dynamic_batching: bool = True
    queue_delay: int = 100
    cuda_graphs: bool = False
    versions: tuple[int, ...] = ()
    labels: bool = False
    warmup: tuple[Warmup, ...] = ()
    parameters: Mapping[str, str] = field(default_factory=dict)
    own: Mapping[str, Any] | str = ""


@dataclass(frozen=True)
class Step:
    """One model of an ensemble, with the names of its tensors: model's name -> ensemble's name."""

    model: str
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]


def config_text(spec: ModelSpec) -> str:
    """config.pbtxt of a model that a backend runs."""
    text_format, proto = protobuf()
    check_name(spec.name)
    config = proto.ModelConfig(name=spec.name)
    if spec.backend == "tensorrt":
        config.platform = "tensorrt_plan"
    else:
        config.backend = spec.backend
    config.max_batch_size = max(spec.batches, default=0)
    _tensors(proto, config, spec.signature, batched=bool(spec.batches))
    if spec.labels:
        config.output[0].label_filename = LABELS
    if spec.file and spec.backend != "python":  # the file of the python backend is always model.py
        config.default_model_filename = spec.file
    preferred = sorted(size for size in spec.batches if size > 1 and spec.dynamic_batching)
    if preferred:
        config.dynamic_batching.preferred_batch_size.extend(preferred)
        config.dynamic_batching.max_queue_delay_microseconds = spec.queue_delay
    kinds = {"cpu": proto.ModelInstanceGroup.KIND_CPU, "cuda": proto.ModelInstanceGroup.KIND_GPU}
    config.instance_group.add(count=spec.instances, kind=kinds[spec.device])
    if spec.cuda_graphs:
        config.optimization.cuda.graphs = True
    if spec.versions:
        config.version_policy.specific.versions.extend(spec.versions)
    for name, value in sorted(spec.parameters.items()):
        config.parameters[name].string_value = value
    types = {tensor.name: tensor.type for tensor in spec.signature.inputs}
    for one in spec.warmup:
        entry = config.model_warmup.add(name=one.name or f"batch-{one.batch}", batch_size=one.batch)
        for name, file in one.files.items():
            sample = entry.inputs[name]
            sample.data_type = proto.DataType.Value(types[name])
            sample.dims.extend(one.dims[name])
            sample.input_data_file = file
    if spec.own:
        merge(config, spec.own)
    return str(text_format.MessageToString(config))


def ensemble_text(name: str, signature: Signature, steps: Sequence[Step], batch: int, labels: bool) -> str:
    """config.pbtxt of models that run one after the other within the server."""
    text_format, proto = protobuf()
    check_name(name)
    config = proto.ModelConfig(name=name, platform="ensemble", max_batch_size=batch)
    _tensors(proto, config, signature, batched=True)
    if labels:
        config.output[0].label_filename = LABELS
    for step in steps:
        entry = config.ensemble_scheduling.step.add(model_name=step.model, model_version=-1)
        entry.input_map.update(step.inputs)
        entry.output_map.update(step.outputs)
    return str(text_format.MessageToString(config))


def read_config(text: str) -> Any:
    """The protobuf message of a config.pbtxt. Raises InputError if it is invalid."""
    text_format, proto = protobuf()
    try:
        return text_format.Parse(text, proto.ModelConfig())
    except text_format.ParseError as error:
        raise InputError("a config.pbtxt cannot be read", str(error), "ship the run again") from None


def _tensors(proto: Any, config: Any, signature: Signature, batched: bool) -> None:
    def add(tensor: Tensor, entries: Any) -> None:
        # Triton adds the batch dimension itself when max_batch_size > 0; -1 is a dynamic dimension.
        dims = tensor.dims[1:] if batched else tensor.dims
        entries.add(name=tensor.name, data_type=proto.DataType.Value(tensor.type), dims=dims)

    for tensor in signature.inputs:
        add(tensor, config.input)
    for tensor in signature.outputs:
        add(tensor, config.output)
