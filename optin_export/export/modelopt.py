"""int8 and fp8 by NVIDIA's Model Optimizer, if it is installed (extra `modelopt`, in a separate environment, because
it pins versions of onnx and onnxruntime)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from optin_export.errors import InputError, missing_package
from optin_export.export.calibration import alike
from optin_export.recipe import ExportSection
from optin_export.workdir.onnx_files import is_external, save_graph

Arrays = Mapping[str, np.ndarray]
#: The recipe's words for its calibration methods.
_METHODS = {"minmax": "max", "entropy": "entropy"}


def quantize(source: Path, path: Path, section: ExportSection, rows: Iterable[Arrays]) -> None:
    """Write the fp32 graph `source` to `path` with int8 or E4M3 Q/DQ pairs where Model Optimizer places them.

    rows: batches of calibration data by input name. Raises EnvironmentLacks without the package.
    """
    tool = _import()
    if section.calibration not in _METHODS:
        raise InputError(
            f"Model Optimizer has no calibration '{section.calibration}'",
            f"it has {', '.join(_METHODS)}",
            "set export.calibration",
        )
    tool.quantize(
        str(source),
        quantize_mode=section.precision,
        calibration_data=_stacked(rows),
        calibration_method=_METHODS[section.calibration],
        calibration_eps=["cpu"],
        high_precision_dtype="fp32",
        output_path=str(path),
        **({"use_external_data_format": True} if is_external(source) else {}),
    )
    if is_external(source):  # the tool chooses its own name for the weights file
        import onnx

        save_graph(onnx.load(path), path, external=True)


def version() -> str:
    _import()
    from modelopt import __version__

    return str(__version__)


def _stacked(rows: Iterable[Arrays]) -> dict[str, np.ndarray]:
    """All rows as one array per input, as the tool requires."""
    batches = alike(rows)
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


def _import() -> Any:
    try:
        from modelopt.onnx import quantization
    except ImportError:
        raise missing_package("nvidia-modelopt", "export.quantizer: modelopt", "modelopt") from None
    return quantization
