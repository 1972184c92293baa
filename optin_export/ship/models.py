"""The models of a shipment: base and pruned (two models, or two versions of one), and the pruned model's ensemble.

Every folder is complete: config.pbtxt, numbered versions, warm-up rows, labels, and its own manifest.json.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from safetensors import safe_open

from optin_export.errors import InputError
from optin_export.recipe import ShipSection, Target
from optin_export.ship import ensemble
from optin_export.ship.config import LABELS, ModelSpec, Warmup, config_text
from optin_export.ship.labels import write_labels
from optin_export.ship.origin import Origin
from optin_export.ship.repository import Writer
from optin_export.ship.signature import Signature, of_engine, of_onnx
from optin_export.workdir.files import read_json, regular, sha256_file
from optin_export.workdir.onnx_files import copy_graph, graph_files

SERVED = Path(__file__).parent / "served"
VERSIONS = {"base": 1, "pruned": 2}


@dataclass(frozen=True)
class Served:
    """The file that is served as 'base' or 'pruned', and the server's parameters for it."""

    file: Path
    signature: Signature
    batches: tuple[int, ...]
    target: Target
    code: str | None
    library: str


def served_as(origin: Origin, which: str) -> Served:
    """The file for the recipe's `ship.backend`. Raises InputError if the backend cannot serve the run."""
    backend, recipe = origin.recipe.ship.backend, origin.recipe
    rtx = [target for target in recipe.targets if target.engine == "tensorrt-rtx"]
    graphs = [target for target in recipe.targets if target.engine == "onnxruntime"]
    openvino = [target for target in recipe.targets if target.engine == "openvino"]
    if backend == "tensorrt":
        return _plan(origin, which, origin.target("tensorrt"), None)
    if backend == "python" and rtx and not graphs:
        return _plan(origin, which, rtx[0], "tensorrt_model.py")
    if backend == "openvino" or (backend == "python" and openvino and not graphs):
        return _openvino(origin, which, origin.target("openvino"), backend == "python")
    graph = origin.graph(which)
    code = "onnxruntime_model.py" if backend == "python" else None
    target = graphs[0] if graphs else Target()
    return Served(graph, of_onnx(graph), recipe.export.batch, target, code, "onnxruntime")


def _openvino(origin: Origin, which: str, target: Target, python: bool) -> Served:
    """OpenVINO's graph. Its own backend fixes the batch if the server forms batches: there the batch is a dimension."""
    signature = of_onnx(origin.folder / "onnx" / f"{which}.onnx")
    batches, code = (origin.recipe.export.batch, "openvino_model.py") if python else ((), None)
    return Served(origin.engine(which, target), signature, batches, target, code, "openvino")


def _plan(origin: Origin, which: str, target: Target, code: str | None) -> Served:
    path = origin.engine(which, target)
    options, batches = target.tensorrt, origin.recipe.export.batch
    if options.strip_plan:
        raise InputError(
            "a stripped engine cannot be served", "its file holds no weights", "set tensorrt.strip_plan: false"
        )
    if not options.dynamic and len(batches) > 1 and code is None:
        raise InputError(
            "the engine holds one fixed batch size per profile",
            f"built for {', '.join(map(str, batches))}; the server also forms batches in between",
            "set targets[].tensorrt.dynamic: true, or a single export.batch",
        )
    try:
        record = read_json(path.with_name(path.name + ".json"))
        signature = of_engine(origin.graph(which), record["profiles"])
        library = str(record["library"])
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise InputError(f"{path.name} has no readable record", str(error), "build it again (--force)") from None
    # Without a range of batch sizes the server adds no batch dimension: dims include it.
    fixed = -1 not in {tensor.dims[0] for tensor in signature.inputs}
    return Served(path, signature, () if fixed else batches, target, code, library)


def files_of(origin: Origin) -> list[Path]:
    """The run's files that a shipment reads."""
    recipe = origin.recipe
    kinds = ("pruned",) if recipe.ship.layout == "pruned" else ("base", "pruned")
    found = [file for which in kinds for file in graph_files(served_as(origin, which).file)]
    optional = [origin.reference] if recipe.ship.warm_up else []
    preprocess = origin.folder / "preprocess"
    optional += sorted(preprocess.glob("*")) if has_ensemble(origin) else [preprocess / LABELS]
    # A link, a folder or a FIFO in place of a file is not silently left out, but refused with the rest.
    return found + [path for path in optional if os.path.lexists(path)]


def has_ensemble(origin: Origin) -> bool:
    """Whether the shipment has NAME-ensemble."""
    return ensemble.is_shipped(origin, batched=bool(served_as(origin, "pruned").batches))


def kinds_of(origin: Origin, name: str) -> dict[str, tuple[str, ...]]:
    """The models of a shipment that run a graph, and which graphs: 'base', 'pruned', or both as versions."""
    layout = origin.recipe.ship.layout
    if layout == "versions":
        return {name: ("base", "pruned")}
    kinds: dict[str, tuple[str, ...]] = {name: ("pruned",)}
    if layout == "models":
        kinds[f"{name}-base"] = ("base",)
    return kinds


def shipment(origin: Origin, name: str) -> dict[str, Writer]:
    """The model folders of a shipment called `name`, each with a function that writes it."""
    section = origin.recipe.ship
    # Without a policy Triton serves only the latest version.
    numbers = {"all": (1, 2), "base": (1,), "pruned": (2,)}[section.serve] if section.layout == "versions" else ()
    models = {model: _writer(origin, model, kinds, numbers) for model, kinds in kinds_of(origin, name).items()}
    if has_ensemble(origin):
        models |= ensemble.writers(origin, name, served_as(origin, "pruned").signature)
    return models


def _writer(origin: Origin, name: str, kinds: Sequence[str], versions: tuple[int, ...]) -> Writer:
    chosen = {which: served_as(origin, which) for which in kinds}
    first = chosen[kinds[0]]
    if any(one.signature != first.signature for one in chosen.values()):
        raise InputError(
            "base and pruned model cannot be versions of one model",
            "their inputs or outputs differ",
            "set ship.layout: models",
        )

    def write(folder: Path) -> None:
        for which, one in chosen.items():
            place = folder / str(VERSIONS[which] if len(chosen) > 1 else 1)
            place.mkdir()
            copy_graph(one.file, place / _file_name(one))
            if one.code is not None:
                shutil.copyfile(SERVED / one.code, place / "model.py")
        spec = _spec(origin, name, first, versions)
        if origin.recipe.ship.warm_up and origin.reference.is_file():
            spec = replace(
                spec, warmup=_write_warmup(origin.reference, folder / "warmup", first, origin.recipe.export.batch)
            )
        spec = replace(spec, labels=write_labels(folder, origin, first.signature))
        (folder / "config.pbtxt").write_text(config_text(spec), encoding="utf-8")

    return write


def _file_name(one: Served) -> str:
    return f"model{one.file.suffix}"


def _spec(origin: Origin, name: str, one: Served, versions: tuple[int, ...]) -> ModelSpec:
    section = origin.recipe.ship
    parameters: dict[str, str] = {}
    if one.library == "openvino":
        parameters = _openvino_parameters(one, section, origin.recipe.export.precision)
    elif one.code == "onnxruntime_model.py":
        parameters = {"file": _file_name(one), "threads": str(one.target.threads)}
    elif one.code is not None:
        parameters = {"file": _file_name(one), "sha256": sha256_file(one.file), "module": one.library}
    elif section.backend == "onnxruntime" and one.target.device == "cpu":
        parameters = {"intra_op_thread_count": str(one.target.threads), "inter_op_thread_count": "1"}
    return ModelSpec(
        name=name,
        backend=section.backend,
        signature=one.signature,
        batches=one.batches,
        file=_file_name(one),
        device=one.target.device,
        instances=section.instances,
        queue_delay=section.queue_delay,
        cuda_graphs=section.backend == "tensorrt" and section.cuda_graphs,
        versions=versions,
        parameters=parameters,
        own=section.config or "",
    )


def _openvino_parameters(one: Served, section: ShipSection, precision: str) -> dict[str, str]:
    """The options with which the engine was measured, by the names of Triton's backend or of our model.py."""
    if one.code is not None:
        kernels = {"fp32": "f32", "bf16": "bf16"}.get(precision, "")
        return {"file": _file_name(one), "threads": str(one.target.threads), "kernels": kernels}
    # The instances of a model share one compiled graph: without a stream each, they would wait for one another.
    return {
        "INFERENCE_NUM_THREADS": str(one.target.threads * section.instances),
        "NUM_STREAMS": str(section.instances),
        "PERFORMANCE_HINT": "LATENCY",
        **({"HINT_BF16": "YES"} if precision == "bf16" else {}),
    }


def _write_warmup(reference: Path, folder: Path, one: Served, sizes: Sequence[int]) -> tuple[Warmup, ...]:
    """Raw rows of the run's real data, one file per input and batch size: the server repeats a row to fill a batch.

    sizes: batch sizes for a model whose batch is a dimension of any size.
    """
    folder.mkdir()
    requests = []
    names = {tensor.name: tensor.dims for tensor in one.signature.inputs}
    try:
        with safe_open(regular(reference), framework="numpy") as tensors:
            rows = {name: tensors.get_tensor(f"input.{name}") for name in names}
        if any(array.ndim < 2 or not array.size for array in rows.values()):
            raise ValueError("an input has no rows")
    except Exception as error:  # a damaged header may also name types that numpy lacks
        raise InputError(f"cannot read the rows in {reference}", str(error)[:300], "run the recipe again") from None
    for index, batch in enumerate(sorted(one.batches)) if one.batches else ():
        files, dims = {}, {}
        for name, array in rows.items():
            row = np.ascontiguousarray(array[index % len(array)])
            files[name], dims[name] = f"batch-{batch}.{name}", row.shape
            (folder / files[name]).write_bytes(row.tobytes())
        requests.append(Warmup(batch, files, dims))
    if not one.batches:  # the batch is part of the dims: whole batches, not rows
        fixed = next(iter(names.values()))[0]
        for count in sorted(sizes) if fixed == -1 else (fixed,):
            files = {name: f"whole-{count}.{name}" for name in rows}
            for name, array in rows.items():
                (folder / files[name]).write_bytes(np.ascontiguousarray(array[:count]).tobytes())
            shapes = {name: (count, *array.shape[1:]) for name, array in rows.items()}
            requests.append(Warmup(1, files, shapes, f"whole-{count}"))
    return tuple(requests)
