"""Convert an fp32 ONNX graph to another precision, with unchanged inputs and outputs: to ONNX, strongly typed, or to
OpenVINO's int8 graph."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from optin_export.errors import InputError
from optin_export.export.half import HALF, to_half
from optin_export.recipe import ExportSection
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


def convert(source: Path, path: Path, section: ExportSection, rows: Iterable[Arrays]) -> Converted:
    """Write the fp32 graph `source` to `path`, NAME.onnx or NAME.xml (OpenVINO's), in `section.precision`.

    rows: batches of calibration data by input name, for static scales; read only where they are needed.
    Raises InputError for a graph that cannot be converted, EnvironmentLacks if a package is missing.
    """
    import onnx

    if path.suffix == ".xml":
        from optin_export.export.nncf import quantize as by_nncf

        facts = by_nncf(source, path, rows)
        return Converted(section.precision, facts.pop("operators"), graph_bytes(path), facts)
    with atomic_graph(path) as temporary:
        if section.precision in HALF:
            model = onnx.load(source, load_external_data=False)
            facts = {"kept_fp32": to_half(model, section.precision, source.parent)}
            save_graph(model, temporary, external=is_external(source))
        else:
            from optin_export.export.quantize import quantize

            facts = quantize(source, temporary, section, rows)
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


def converters(section: ExportSection, path: Path) -> dict[str, str]:
    """Versions of the packages that a conversion to `path` depends on."""
    import onnx

    if path.suffix == ".xml":
        from optin_export.export.nncf import versions as of_nncf

        return of_nncf()

    if section.precision in ("int8", "fp8"):
        from optin_export.export.quantize import versions

        return versions(section)
    return {"onnx": onnx.__version__}
