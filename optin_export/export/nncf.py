"""int8 for OpenVINO by NNCF's post-training quantisation (extra `openvino`): OpenVINO's graph with fake quantisers,
which its CPU plugin turns into int8 kernels."""

from __future__ import annotations

import contextlib
import io
import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from optin_export.environment import variable
from optin_export.errors import InputError, missing_package
from optin_export.workdir.onnx_files import atomic_graph

Arrays = Mapping[str, np.ndarray]


def quantize(source: Path, path: Path, rows: Iterable[Arrays], weight_bits: int = 8) -> dict[str, Any]:
    """Write the fp32 ONNX graph `source` in int8 to `path`, NAME.xml with its weights in NAME.bin.

    Args:
        rows: batches of calibration data by input name, [rows, ...] each.
        weight_bits: 7 gives the weights of all layers half of the range.

    Returns:
        Facts: the number of operators, and of activations that are quantised.

    Raises:
        EnvironmentLacks: a package is missing.
        InputError: there is nothing to quantise.
    """
    runtime, nncf = _import()
    model = runtime.Core().read_model(source)
    # NNCF derives ranges from each item of the data: single rows, as batches are padded.
    single = [{name: array[row : row + 1] for name, array in batch.items()} for batch in rows for row in _rows(batch)]
    names = {port.any_name for port in model.inputs}
    data = nncf.Dataset([{name: array for name, array in row.items() if name in names} for row in single])
    kind = nncf.ModelType.TRANSFORMER if has_attention(model) else None
    with contextlib.redirect_stdout(io.StringIO()):  # its progress bars
        fix = nncf.quantization.advanced_parameters.OverflowFix
        chosen = fix.ENABLE if weight_bits < 8 else fix.FIRST_LAYER
        more = nncf.AdvancedQuantizationParameters(overflow_fix=chosen)
        quantized = nncf.quantize(model, data, model_type=kind, subset_size=len(single), advanced_parameters=more)
    counts = Counter(operator.get_type_name() for operator in quantized.get_ops())
    if not counts["FakeQuantize"]:
        raise InputError(
            f"{source.name} has nothing to quantise", "NNCF placed no quantiser", "use export.precision: fp32 or bf16"
        )
    with atomic_graph(path) as temporary:
        runtime.save_model(quantized, temporary, compress_to_fp16=False)
    facts = {"quantizer": "nncf", "operators": sum(counts.values()), "quantised_activations": counts["FakeQuantize"]}
    return facts if weight_bits == 8 else {**facts, "weight_bits": weight_bits}


def has_attention(model: Any) -> bool:
    """Whether a graph of OpenVINO multiplies activations with each other, which NNCF treats as a transformer."""
    activations: set[str] = set()  # operators whose output depends on the model's inputs
    for operator in model.get_ordered_ops():
        given = [value.get_node().get_name() in activations for value in operator.input_values()]
        kind = operator.get_type_name()
        if kind == "ScaledDotProductAttention" or (kind == "MatMul" and all(given)):
            return True
        if kind == "Parameter" or any(given):
            activations.add(operator.get_name())
    return False


def versions() -> dict[str, str]:
    runtime, nncf = _import()
    return {"openvino": runtime.__version__.partition("-")[0], "nncf": nncf.__version__}


def _rows(batch: Arrays) -> range:
    return range(len(next(iter(batch.values()))))


def _import() -> tuple[Any, Any]:
    try:
        import openvino

        with variable("NNCF_CI", "1"):  # it would report its use over the network
            import nncf
    except ImportError as error:
        package = error.name or "nncf"
        raise missing_package(package, "export.precision: int8 for the target engine openvino", "openvino") from None
    nncf.set_log_level(logging.ERROR)
    return openvino, nncf
