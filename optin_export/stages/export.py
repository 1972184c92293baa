"""Stage `export`: ONNX files, and for the engines that need them torch programs and OpenVINO's int8 graphs."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from optin_export import engines
from optin_export.environment import sums_of_int8_overflow
from optin_export.export import convert, converters, export_onnx, export_program, weight_bits
from optin_export.progress import phase, report
from optin_export.recipe import MODELS, engine_name
from optin_export.stages.context import FILES, RunContext
from optin_export.workdir.files import sha256_file
from optin_export.workdir.onnx_files import graph_files, sha256_graph


def export_models(work: RunContext) -> None:
    """Write onnx/base.onnx and onnx/pruned.onnx, and both in the recipe's precision, e.g. onnx/base.int8.onnx, as far
    as engines are built from them."""
    section = work.recipe.export
    origin = {
        "base": {key: work.digest[key] for key in ("weights", "architecture")},
        "pruned": {name: sha256_file(work.folder / "model" / name) for name in FILES},
    }
    for done, which in enumerate(MODELS):
        path = work.onnx(which)
        phase(path.name)

        def run(which: str = which, path: Path = path) -> dict[str, Any]:
            model = work.sources.model if which == "base" else work.dense
            # At least two rows: a batch of one would be fixed in the graph.
            inputs = work.sources.fixed(2)
            sequence = section.sequence if work.recipe.is_text and not work.recipe.tokens.merges else None
            return export_onnx(model, inputs, path, max_batch=max(section.batch), sequence=sequence).to_json()

        inputs = {
            **origin[which],
            "export": {"batch": section.batch, "sequence": section.sequence, "merges": work.recipe.tokens.merges},
            "inputs": {name: list(tensor.shape) for name, tensor in work.sources.fixed(2).items()},
            "torch": torch.__version__,
        }
        work.cache.step("export", f"export.{which}", inputs, partial(graph_files, path), run)
        if any(target.engine == "torch" for target in work.recipe.targets):
            _export_program(work, which, inputs)
        report(done + 1, len(work.engine_names))
    if section.precision != "fp32":
        _warn_of_clipping(work)
        _convert_all(work)


def _convert_all(work: RunContext) -> None:
    """Write what the targets' engines are built from in the recipe's precision, each file once."""
    precision, written = work.recipe.export.precision, set[Path]()
    for target in work.recipe.targets:
        with work.attempt(target):
            for which in MODELS:
                path = engines.source_of(work.folder, target, engine_name(which, precision))
                if path not in written and path != engines.source_of(work.folder, target, which):
                    _convert(work, which, path)
                    written.add(path)
                    report(min(len(MODELS) + len(written), len(work.engine_names)), len(work.engine_names))


def _warn_of_clipping(work: RunContext) -> None:
    """Symmetric int8 graphs for a GPU have weights of 8 bits, whose sums an old x86 CPU clips."""
    section, targets = work.recipe.export, work.recipe.targets
    here = [one.name for one in targets if (one.engine, one.device) == ("onnxruntime", "cpu")]
    is_static = section.precision == "int8" and section.quantization == "static"
    if here and is_static and sums_of_int8_overflow() and weight_bits(section, targets, Path("pruned.onnx")) == 8:
        work.cache.warn(
            f"this CPU has no VNNI and clips sums of 8-bit products: int8 results of {here[0]} will be wrong here, "
            "while those on a GPU are right; give the CPU target a recipe of its own, or set "
            "export.quantization: static-u8"
        )


def _export_program(work: RunContext, which: str, inputs: dict[str, Any]) -> None:
    """Write onnx/<which>.pt2, from which the torch engine is built."""
    path, section = work.onnx(which).with_suffix(".pt2"), work.recipe.export

    def run() -> dict[str, Any]:
        model = work.sources.model if which == "base" else work.dense
        sequence = section.sequence if work.recipe.is_text and not work.recipe.tokens.merges else None
        return asdict(
            export_program(model, work.sources.fixed(2), path, max_batch=max(section.batch), sequence=sequence)
        )

    work.cache.step("export", f"export.program.{which}", inputs, [path], run)


def _convert(work: RunContext, which: str, path: Path) -> None:
    """Write one model in the recipe's precision, from its fp32 graph and, for scales, calibration rows."""
    section, name = work.recipe.export, engine_name(which, work.recipe.export.precision)
    bits = weight_bits(section, work.recipe.targets, path)

    def run() -> dict[str, Any]:
        rows = ({n: t.numpy() for n, t in batch.inputs.items()} for batch in work.sources.quantization)
        return convert(work.onnx(which), path, section, rows, bits).to_json()

    inputs = {
        "onnx": sha256_graph(work.onnx(which)),
        "export": section.model_dump(mode="json", exclude={"batch"}),
        "digest": work.calibration_digest,
        "seed": work.recipe.seed,
        "versions": converters(section, path),
        **({"weight_bits": bits} if bits < 8 else {}),
    }
    step = f"export.{name}" if path.suffix == ".onnx" else f"export.{name}{path.suffix}"
    work.cache.step("export", step, inputs, partial(graph_files, path), run)
