"""Convert an fp32 ONNX graph to another precision, with unchanged inputs and outputs: to ONNX, strongly typed, or to
OpenVINO's int8 graph."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from optin_export.environment import sums_of_int8_overflow
from optin_export.errors import InputError
from optin_export.export.half import HALF, to_half
from optin_export.recipe import ExportSection, Target
from optin_export.workdir.onnx_files import atomic_graph, graph_bytes, is_external, save_graph

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Converted:
    """Facts about a converted graph: its size, and the changes."""

    precision: str
    nodes: int
    bytes: int
    facts: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def convert(
    source: Path, path: Path, section: ExportSection, rows: Iterable[Arrays], weight_bits: int = 8
) -> Converted:
    """Write the fp32 graph `source` to `path`, NAME.onnx or NAME.xml (OpenVINO's), in `section.precision`.

    rows: batches of calibration data by input name, for static scales; read only where they are needed.
    weight_bits: of int8 weights, see `weight_bits`.
    Raises InputError for a graph that cannot be converted, EnvironmentLacks if a package is missing.
    """
    import onnx

    if path.suffix == ".xml":
        from optin_export.export.nncf import quantize as by_nncf

        facts = by_nncf(source, path, rows, weight_bits)
        return Converted(section.precision, facts.pop("operators"), graph_bytes(path), facts)
    with atomic_graph(path) as temporary:
        if section.precision in HALF:
            model = onnx.load(source, load_external_data=False)
            facts = {"kept_fp32": to_half(model, section.precision, source.parent)}
            save_graph(model, temporary, external=is_external(source))
        else:
            from optin_export.export.quantize import quantize

            facts = quantize(source, temporary, section, rows, weight_bits)
        model = onnx.load(temporary, load_external_data=False)
        try:
            onnx.checker.check_model(str(temporary), full_check=True)
        except Exception as error:  # its exception types differ between versions of onnx
            raise InputError(
                f"{source.name} cannot be written in {section.precision}",
                str(error)[:300],
                "use export.precision: fp32",
            ) from error
    return Converted(section.precision, len(model.graph.node), graph_bytes(path), facts)


def weight_bits(section: ExportSection, targets: Sequence[Target], path: Path) -> int:
    """Bits of the int8 weights that `convert` writes to `path` for all of these targets, 7 or 8.

    7 on a CPU whose int8 kernels clip sums of 8-bit products, if it runs what is made. Symmetric Q/DQ pairs keep 8 as
    soon as one target is a GPU, which adds without clipping.
    """
    if section.precision != "int8" or not sums_of_int8_overflow():
        return 8
    if path.suffix == ".xml":
        return 7
    on_cpu = all(target.device == "cpu" for target in targets)
    return 7 if on_cpu or section.quantization != "static" else 8


def converters(section: ExportSection, path: Path) -> dict[str, str]:
    """Versions of the packages that a conversion to `path` depends on."""
    import onnx

    if path.suffix == ".xml":
        from optin_export.export.nncf import versions as of_nncf

        return of_nncf()

    if section.precision in ("int8", "fp8"):
        from optin_export.export.quantize import versions

        return versions()
    return {"onnx": onnx.__version__}
