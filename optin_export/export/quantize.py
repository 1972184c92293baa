"""int8 and fp8 by onnxruntime's quantisation tools: Q/DQ pairs with calibrated scales, or scales at run time.

There are three forms, because engines differ in what they run fast: `static` has symmetric Q/DQ pairs at the inputs of
convolutions and of products with weights, as TensorRT requires; `static-u8` has unsigned activations with zero points,
for onnxruntime's fast kernels on x86; `dynamic` computes the scale of each activation at run time.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from optin_export.errors import InputError, missing_package
from optin_export.export.calibration import alike
from optin_export.recipe import ExportSection
from optin_export.workdir.files import Scratch, writing
from optin_export.workdir.onnx_files import data_file, is_external, save_graph

Arrays = Mapping[str, np.ndarray]
#: The quantised operators: products with weights. The rest is cheap and stays in fp32.
OPERATORS = ["MatMul", "Gemm", "Conv"]
#: Largest values of the two eight-bit formats.
INT8_MAX, E4M3_MAX = 127.0, 448.0
_OPTIONS = {
    "WeightSymmetric": True,
    "QuantizeBias": False,  # TensorRT rejects int32 biases
    "DedicatedQDQPair": True,  # one pair per consumer, so that each can be fused
    "OpTypesToExcludeOutputQuantization": OPERATORS,
}


def quantize(
    source: Path, path: Path, section: ExportSection, rows: Iterable[Arrays], weight_bits: int = 8
) -> dict[str, Any]:
    """Write the fp32 graph `source` to `path` in int8 or fp8; returns facts: the form and what was quantised.

    rows: batches of calibration data by input name; not read for dynamic quantisation. weight_bits: 7 or 8, of int8
    weights that onnxruntime's tools make.
    Raises EnvironmentLacks without the package, InputError if there is nothing to quantise.
    """
    import onnx

    external = is_external(source)
    tools, prepare = _import()
    with contextlib.closing(Scratch()) as scratch:
        prepared = scratch.path / "prepared.onnx"
        external_file = {"external_data_location": data_file(prepared).name, "save_as_external_data": True}
        with writing(prepared):
            prepare(str(source), str(prepared), skip_symbolic_shape=True, **(external_file if external else {}))
        if section.quantization == "dynamic":
            _dynamic(tools, prepared, path, external, weight_bits < 8)
        else:
            _static(tools, prepared, path, section, rows, external, weight_bits < 8)
        if section.precision == "fp8":
            model = onnx.load(path)
            to_fp8(model)
            save_graph(model, path, external)
    model = onnx.load(path, load_external_data=False)
    _unnamed(model)
    onnx.save_model(model, path)
    counts = Counter(node.op_type for node in model.graph.node)
    quantised = {name: counts[name] for name in sorted(counts) if "Quantize" in name or name.endswith("Integer")}
    if not quantised:
        raise InputError(
            f"{source.name} has nothing to quantise", "no product with weights was found", "use export.precision: fp32"
        )
    bits = {} if weight_bits == 8 else {"weight_bits": weight_bits}
    return {"form": section.quantization, "quantizer": "onnxruntime", "nodes": quantised, **bits}


def versions() -> dict[str, str]:
    """Versions of the quantisation packages."""
    _import()
    import onnxruntime

    return {"onnxruntime": onnxruntime.__version__}


def _static(
    tools: Any,
    prepared: Path,
    path: Path,
    section: ExportSection,
    rows: Iterable[Arrays],
    external: bool,
    reduce_range: bool,
) -> None:
    unsigned = section.quantization == "static-u8"

    class Reader(tools.CalibrationDataReader):
        """The rows, one batch after the other."""

        def __init__(self) -> None:
            # Histograms are made over all batches together, which requires equal shapes.
            self.batches: Iterator[Arrays] = iter(rows if section.calibration == "minmax" else alike(rows))

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self.batches, None)
            return None if batch is None else {name: batch[name] for name in names}

    names = _inputs(prepared)
    tools.quantize_static(
        str(prepared),
        str(path),
        Reader(),
        quant_format=tools.QuantFormat.QDQ,
        activation_type=tools.QuantType.QUInt8 if unsigned else tools.QuantType.QInt8,
        weight_type=tools.QuantType.QInt8,
        per_channel=True,
        reduce_range=reduce_range,
        calibrate_method=getattr(tools.CalibrationMethod, _METHODS[section.calibration]),
        op_types_to_quantize=OPERATORS,
        nodes_to_exclude=_without_weights(prepared),
        use_external_data_format=external,
        extra_options={
            **_OPTIONS,
            "ActivationSymmetric": not unsigned,
            "AddQDQPairToWeight": section.precision == "fp8",
        },
    )


_METHODS = {"minmax": "MinMax", "entropy": "Entropy", "percentile": "Percentile"}


def _dynamic(tools: Any, prepared: Path, path: Path, external: bool, reduce_range: bool) -> None:
    """int8 weights per channel, of 7 bits if reduce_range; the tool makes activations uint8, as x86 kernels require."""
    tools.quantize_dynamic(
        str(prepared),
        str(path),
        op_types_to_quantize=OPERATORS,
        per_channel=True,
        reduce_range=reduce_range,
        weight_type=tools.QuantType.QInt8,
        use_external_data_format=external,
        extra_options={"MatMulConstBOnly": True},
    )


def to_fp8(model: Any) -> None:
    """Turn symmetric int8 Q/DQ pairs, weights' pairs included, into E4M3 pairs of the same range, in place.

    The scale of an int8 pair is (largest value) / 127, that of an E4M3 pair (largest value) / 448.
    """
    from onnx import TensorProto, helper, numpy_helper

    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    scales, zeros = set(), set()
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            scales.add(node.input[1])
            zeros.add(node.input[2])
    for name in scales:
        scale = numpy_helper.to_array(constants[name]) * np.float32(INT8_MAX / E4M3_MAX)
        constants[name].CopyFrom(numpy_helper.from_array(scale, name))
    kind = helper.tensor_dtype_to_np_dtype(TensorProto.FLOAT8E4M3FN)
    for name in zeros:
        zero = numpy_helper.to_array(constants[name])
        assert not zero.any(), "a symmetric graph has no zero points"
        constants[name].CopyFrom(numpy_helper.from_array(zero.astype(kind), name))
    # Types of the quantised values are inferred again by readers of the graph.
    del model.graph.value_info[:]


def _without_weights(path: Path) -> list[str]:
    """Names of the products of two activations (attention): they stay in fp32.

    The tool's own option for this, MatMulConstBOnly, applies only to operators, not to Q/DQ pairs.
    """
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    constants = {tensor.name for tensor in graph.initializer}
    return [node.name for node in graph.node if node.op_type in OPERATORS and node.input[1] not in constants]


def _inputs(path: Path) -> list[str]:
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    constants = {tensor.name for tensor in graph.initializer}
    return [value.name for value in graph.input if value.name not in constants]


def _unnamed(model: Any) -> None:
    """Remove names of the tools' temporary files."""
    del model.metadata_props[:]
    model.doc_string = ""


def _import() -> tuple[Any, Any]:
    try:
        from onnxruntime import quantization
        from onnxruntime.quantization.shape_inference import quant_pre_process
    except ImportError:
        raise missing_package("onnxruntime", "export.precision: int8 or fp8", "cpu") from None
    return quantization, quant_pre_process
