"""The recipe section `export`: shapes, precision and quantisation of the graph."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from optin_export.recipe.fields import BatchSize, Count, Positive, Section
from optin_export.recipe.precision import Precision
from optin_export.recipe.removed import without_quantizer


class ExportSection(Section):
    precision: Precision = Field(
        "fp32",
        description="precision of the shipped graph; both models are also built and measured in fp32",
    )
    quantization: Literal["static", "static-u8", "dynamic"] = Field(
        "static",
        description="int8: static: symmetric Q/DQ pairs with scales from the calibration data, for every engine; "
        "for onnxruntime on the CPU only: static-u8: with unsigned activations, dynamic: scales found at run time. "
        "Engines of openvino are always quantised by NNCF, with scales from the calibration data",
    )
    calibration: Literal["minmax", "entropy", "percentile"] = Field(
        "minmax", description="static: how an activation's range is chosen from the calibration data"
    )
    calibration_rows: Count = Field(128, description="int8 (static) and fp8: number of calibration rows for the scales")
    batch: tuple[BatchSize, ...] = Field((1, 8), min_length=1, description="batch sizes to ship and to measure")
    sequence: Count = Field(128, description="text: longest sequence in tokens; latency is measured at this length")
    seconds: Positive | None = Field(
        None,
        description="audio of raw samples: length of every row; longer recordings are cut, shorter ones padded; "
        "default: the longest calibration row",
        examples=[5.0],
    )

    @model_validator(mode="before")
    @classmethod
    def _of_earlier_versions(cls, section: Any) -> Any:
        return without_quantizer(section)

    @model_validator(mode="after")
    def _quantized(self) -> ExportSection:
        if self.quantization != "static" and self.precision != "int8":
            raise ValueError(f"export.quantization: {self.quantization} is for precision: int8")
        return self

    def cannot(self, engine: str, device: str) -> str | None:
        """Why an engine of this target cannot be built in the precision of the recipe, or None."""
        if engine == "auto":  # it takes an engine that can
            return None
        on_cpu = engine == "onnxruntime" and device == "cpu"
        if engine == "openvino":
            known = ("fp32", "bf16", "int8")
            return None if self.precision in known else f"OpenVINO computes on the CPU in {', '.join(known)}"
        if self.precision == "bf16" and on_cpu:
            return "onnxruntime has no bf16 kernels on the CPU, so nothing could be checked; use fp16 or a GPU"
        if self.quantization != "static" and not on_cpu:
            return f"quantization: {self.quantization} is for onnxruntime on the CPU; set export.quantization: static"
        if self.precision != "fp32" and engine not in ("onnxruntime", "tensorrt", "tensorrt-rtx"):
            return "it is not built from the ONNX graph; use fp32 or another engine"
        return None
