"""Build and measure targets with resources on nodes that have them, and return the results as files."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from optin_export import engines
from optin_export.data import Dataset, load_sources
from optin_export.distributed.costs import Book
from optin_export.distributed.file_transfer import PackedFiles, pack, unpack
from optin_export.distributed.remote_tasks import measure_on_node
from optin_export.errors import OptinError
from optin_export.progress import report
from optin_export.recipe import Recipe, Target, engine_names
from optin_export.report import FLEET, still_elsewhere
from optin_export.ship.manifest import add_files
from optin_export.workdir.files import write_json
from optin_export.workdir.onnx_files import graph_files

if TYPE_CHECKING:
    from optin_export.distributed.ray_session import Session


def measure_fleet(session: Session, recipe: Recipe, folder: Path, book: Book, force: bool = False) -> None:
    """Measure the recipe's targets with resources on nodes that have them; results of the same graphs are kept.

    folder: the finished run. Writes machines/<machine>/ and, for targets that were not measured, cluster/fleet.json.
    """
    known = set() if force else {one.target for one in still_elsewhere(folder)}
    reasons: dict[str, str] = {}
    tasks, data = {}, None
    for target in recipe.fleet:
        # A share of a GPU may be named; otherwise a CUDA target reserves a whole GPU.
        wanted = ({"GPU": 1.0} if target.device == "cuda" else {}) | dict(target.resources)
        missing = session.missing(wanted)
        if target.name in known:
            continue
        if missing is not None:
            reasons[target.name] = f"no node of the cluster has {missing}"
            continue
        data = data or session.put(_evaluation(recipe))
        packed = _needed(recipe, folder, target)
        book.stage("fleet").bytes_out += packed.size
        tasks[session.submit(measure_on_node, session.put(packed), target, data, resources=wanted)] = target.name
    for number, (name, (reason, packed), facts) in enumerate(session.finished(tasks, lambda: None)):
        if reason is not None:
            reasons[name] = f"{reason} (on {facts['worker']})"
        else:
            add_files(folder, unpack(packed, folder))
            book.stage("fleet").bytes_back += packed.size
        book.done("fleet", name, facts)
        report(number + 1, len(tasks))
    write_json(folder / FLEET, {"unmeasured": reasons})
    book.save()


def _needed(recipe: Recipe, folder: Path, target: Target) -> PackedFiles:
    """The files of a run that a node needs: graphs, rows with their answers, and files that identify the run."""
    names = ("recipe.yaml", "report.json", "manifest.json", "measure/reference.safetensors")
    sources = [engines.source_of(folder, target, which) for which in engine_names(recipe.export.precision)]
    graphs = [file for source in dict.fromkeys(sources) for file in graph_files(source)]
    return pack(folder, [*(folder / name for name in names), *graphs])


def _evaluation(recipe: Recipe) -> Dataset | None:
    """The evaluation data, which the node cannot read for itself."""
    if recipe.data.evaluation is None:
        return None
    try:
        data = load_sources(recipe).evaluation()
        # Label maps are read from files when needed, which a node may not have.
        return data if data is None else dataclasses.replace(data, labels=_values(data.labels))
    except OptinError:
        return None


def _values(labels: Sequence[Any] | np.ndarray) -> Sequence[Any] | np.ndarray:
    return labels if isinstance(labels, np.ndarray) else [labels[row] for row in range(len(labels))]
