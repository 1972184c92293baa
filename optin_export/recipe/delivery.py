"""The recipe sections about deployment: targets and the Triton repository."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from optin_export.recipe.fields import ComputeCapability, Count, Number, Positive, Section


class TensorRTOptions(Section):
    """How a TensorRT engine is built; names as in trtexec."""

    dynamic: bool = Field(
        False,
        description="one profile for all batch sizes and shorter sequences, instead of one profile per batch size",
    )
    workspace: Count | None = Field(None, description="scratch memory in MiB; default: unlimited")
    builder_optimization_level: Annotated[int, Field(ge=0, le=5), Number] = Field(
        3, description="how long TensorRT searches for fast kernels: 0 builds fastest, 5 searches longest"
    )
    version_compatible: bool = Field(False, description="the engine also runs with later versions of the library")
    hardware_compatibility: Literal["none", "ampere_plus", "same_compute_capability"] = Field(
        "none", description="other GPUs on which the engine runs"
    )
    refit: bool = Field(False, description="the weights can be replaced later")
    strip_plan: bool = Field(
        False, description="the file contains no weights and is not measured; refit it on the target"
    )
    weight_streaming: bool = Field(False, description="weights may stay in host memory while the engine runs")
    profiling_verbosity: Literal["layer_names_only", "detailed", "none"] = Field(
        "detailed", description="how much detail about its layers the engine keeps"
    )
    compute_capabilities: tuple[ComputeCapability, ...] = Field(
        (),
        description="tensorrt-rtx only: compute capabilities to build for, e.g. [8.9] or [sm_89]; default: this "
        "machine's GPU",
        examples=[[8.9]],
    )


#: The engines among which `engine: auto` chooses.
AUTO = ("onnxruntime", "openvino")


class Target(Section):
    engine: Literal["onnxruntime", "openvino", "torch", "tensorrt", "tensorrt-rtx", "auto"] = Field(
        "onnxruntime",
        description="the library that runs the model; auto: on the CPU, the fastest of onnxruntime and openvino that "
        "is installed and passes parity and accuracy in the recipe's precision",
    )
    device: Literal["cpu", "cuda"] = Field("cpu", description="the device; default: cpu, for TensorRT cuda")
    threads: Count = Field(1, description="number of CPU threads of the engine")
    provider: Literal["cuda", "tensorrt"] = Field("cuda", description="onnxruntime on cuda: execution provider")
    compile: bool = Field(False, description="torch: apply torch.compile")
    mode: Literal["call", "call+graph", "device", "device+graph"] = Field(
        "call",
        description="GPU: the measurement that the gates use: call (with copies of inputs and outputs), device (data "
        "stays on the GPU); +graph: as a CUDA graph. All four are measured",
    )
    tensorrt: TensorRTOptions = Field(
        TensorRTOptions(), description="build options for the engines tensorrt and tensorrt-rtx"
    )
    resources: dict[Annotated[str, Field(min_length=1, max_length=100)], Positive] = Field(
        default_factory=dict,
        description="Ray resources, e.g. {'accelerator_type:L4': 1}: build and measure on a cluster node that has them "
        "(--cluster); default: on this machine",
        examples=[{"accelerator_type:L4": 1}],
    )

    @model_validator(mode="before")
    @classmethod
    def _device_of_engine(cls, values: Any) -> Any:
        if isinstance(values, dict) and str(values.get("engine", "")).startswith("tensorrt"):
            return {"device": "cuda", **values}
        return values

    @model_validator(mode="after")
    def _options_of_engine(self) -> Target:
        is_tensorrt = self.engine.startswith("tensorrt")
        if is_tensorrt and self.device != "cuda":
            raise ValueError(f"targets: {self.engine} runs on device: cuda only")
        if self.engine in ("openvino", "auto") and self.device != "cpu":
            raise ValueError(f"targets: {self.engine} runs on device: cpu only")
        if self.engine == "auto" and self.resources:
            raise ValueError("targets: auto chooses on this machine; with resources, name an engine")
        if self.tensorrt != TensorRTOptions() and not is_tensorrt:
            raise ValueError("targets: the section tensorrt is for the engines tensorrt and tensorrt-rtx")
        if self.tensorrt.compute_capabilities and self.engine != "tensorrt-rtx":
            raise ValueError("targets: compute_capabilities is for the engine tensorrt-rtx")
        if self.provider != "cuda" and (self.engine, self.device) != ("onnxruntime", "cuda"):
            raise ValueError("targets: provider is for the engine onnxruntime on device: cuda")
        if self.compile and self.engine != "torch":
            raise ValueError("targets: compile is for the engine torch")
        if self.mode != "call" and self.device != "cuda":
            raise ValueError("targets: mode is for device: cuda; on the CPU there are no copies")
        return self

    @property
    def name(self) -> str:
        words: list[str] = [self.engine, self.device]
        if self.device == "cpu":
            words.append(f"{self.threads}t")
        if self.provider != "cuda":
            words.append(self.provider)
        if self.compile:
            words.append("compile")
        words += [re.sub(r"[^a-z0-9]+", "-", label.lower()).strip("-") for label in sorted(self.resources)]
        return "-".join(words)


class ShipSection(Section):
    """What is written for Triton Inference Server after every gate has passed."""

    triton: bool = Field(False, description="write a Triton model repository if every gate passes")
    backend: Literal["onnxruntime", "openvino", "python", "tensorrt"] = Field(
        "onnxruntime",
        description="Triton's backend; openvino: for bf16 and int8, without batching in the server; python: a small "
        "model.py that runs the graph, or an engine of openvino or tensorrt-rtx",
    )
    layout: Literal["models", "versions", "pruned"] = Field(
        "models",
        description="models: NAME-base and NAME; versions: 1 (base) and 2 (pruned) of NAME; pruned: NAME alone",
    )
    serve: Literal["all", "base", "pruned"] = Field("all", description="layout versions: which versions Triton serves")
    ensemble: bool | None = Field(
        None,
        description="also write NAME-ensemble, which takes text or an encoded image; default: for text classification "
        "and text embeddings, with a backend that forms batches",
    )
    padding: Literal["sequence", "longest"] = Field(
        "sequence",
        description="NAME-ensemble of a text model: sequence: pad every text to export.sequence, so that the server "
        "can batch requests of different clients; longest: pad to the longest text of a request, which is faster for "
        "single short texts, but only requests of equal length are batched",
    )
    instances: Count = Field(1, description="number of parallel instances of each model on the server")
    queue_delay: Annotated[int, Field(ge=0), Number] = Field(
        100, description="microseconds that a request may wait to be batched with others"
    )
    config: dict[str, Any] | str | None = Field(
        None,
        description="your own part of config.pbtxt, merged into that of every model but the ensemble: a mapping, or "
        "protobuf text; fields of Triton's model_config.proto such as dynamic_batching, instance_group, response_cache",
        examples=[{"dynamic_batching": {"default_queue_policy": {"max_queue_size": 64}}}],
    )
    warm_up: bool = Field(True, description="the server runs real rows before it reports a model as ready")
    cuda_graphs: bool = Field(True, description="backend tensorrt: the server uses CUDA graphs")
    labels: tuple[str, ...] | None = Field(
        None,
        min_length=1,
        description="class names, one per output; default: the model's own, if it has any",
        examples=[["negative", "positive"]],
    )
    model_license: str | None = Field(
        None,
        description="licence of the model, for the manifest; default: from the model's README",
        examples=["apache-2.0"],
    )
    data_license: str | None = Field(
        None, description="licence of the calibration data, for the manifest", examples=["cc-by-4.0"]
    )

    def check_backend(self, targets: Sequence[Target], precision: str) -> None:
        """Check that Triton's backend can run what the OpenVINO targets measure. Raises ValueError."""
        engines = {target.engine for target in targets}
        if not self.triton or "auto" in engines:  # which decides the backend
            return
        if self.backend == "openvino" and "openvino" not in engines:
            raise ValueError("ship.backend: openvino needs {engine: openvino} in targets")
        if self.backend == "openvino" and precision == "fp32":
            raise ValueError(
                "ship.backend: openvino has no parameter for fp32, and would compute in bf16 where the CPU can; "
                "set export.precision: bf16 or int8, or ship.backend: python"
            )
        if self.backend == "openvino" and self.ensemble:
            raise ValueError("ship.ensemble needs batching in the server: set ship.backend: python")
        if self.backend == "onnxruntime" and "openvino" in engines and "onnxruntime" not in engines:
            raise ValueError(
                "ship.backend: onnxruntime would serve what no target measures; set ship.backend: openvino or python"
            )
