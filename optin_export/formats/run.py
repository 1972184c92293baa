"""A finished run as the source of an export, and the refusals that all formats share."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from optin_export.errors import InputError
from optin_export.models import Inputs, TaskModel, as_rows, counted_rows
from optin_export.pruning import Architecture, PythonSource, load_model
from optin_export.recipe import Recipe
from optin_export.report.schema import Report, read_report
from optin_export.sentence import Files, name_of, transformer_subfolder
from optin_export.ship import Origin
from optin_export.workdir.files import read_json, regular
from optin_export.workdir.onnx_files import copy_graph, graph_files
from optin_export.workdir.run_directory import existing_run

#: Largest difference between the outputs of a folder and of the run, relative to the largest output: float rounding.
SAME = 1e-4
#: Rows with which a folder's model is compared.
ROWS = 8


@dataclass(frozen=True, eq=False)
class FinishedRun:
    """origin: its files and where its model comes from. report, architecture: what it wrote."""

    origin: Origin
    report: Report
    architecture: Architecture

    @property
    def folder(self) -> Path:
        return self.origin.folder

    @property
    def recipe(self) -> Recipe:
        return self.origin.recipe

    @property
    def base(self) -> dict[str, Any]:
        """What builds the unpruned model."""
        return self.architecture.base

    @property
    def task(self) -> str:
        return str(self.base["task"])

    @cached_property
    def model(self) -> TaskModel:
        """The pruned task model."""
        return load_model(self.folder / "model", PythonSource(self.recipe.model.source, self.recipe.model.args))

    @cached_property
    def rows(self) -> tuple[Inputs, torch.Tensor]:
        """Real inputs of the run and what its model answered to them."""
        tensors = load_file(regular(self.origin.reference))
        inputs = {name.removeprefix("input."): rows[:ROWS] for name, rows in tensors.items() if name[:6] == "input."}
        return inputs, tensors["output.pruned"][:ROWS]

    @cached_property
    def files(self) -> Files:
        """Files of the unpruned model: its folder, or what the local cache holds of the hub's model."""
        return Files(name_of(self.recipe.model.source) or "", False)

    def original(self, name: str) -> Path | None:
        """A file in the unpruned model's folder (where its config.json is), or None."""
        inside = transformer_subfolder(self.files) if self.files.name else ""
        return self.files.find(f"{inside}/{name}" if inside else name) if self.files.name else None

    def copy_onnx(self, folder: Path) -> None:
        """Write onnx/model.onnx: the graph that was measured, in the run's precision."""
        (folder / "onnx").mkdir()
        copy_graph(self.origin.graph("pruned"), folder / "onnx" / "model.onnx")


def open_run(folder: Path) -> FinishedRun:
    """Open a finished run. Raises InputError if the folder is not a run, or has files that are not in its manifest."""
    existing_run(folder)
    report = read_report(folder)
    origin = Origin.from_run(folder)
    model = [folder / "model" / name for name in ("architecture.json", "model.safetensors")]
    origin.check([*model, *graph_files(origin.graph("pruned")), origin.reference], allow_failed=True)
    try:
        architecture = Architecture.model_validate(read_json(model[0]))
    except (OSError, ValueError, ValidationError) as error:
        raise InputError(f"cannot read {model[0]}", str(error)[:300], "run the recipe again") from None
    return FinishedRun(origin, report, architecture)


class OtherOutputs(InputError):
    """A folder's model computes something else than the run's."""


def unfit(run: FinishedRun, name: str, why: str, fix: str) -> InputError:
    """The error for a run that a format cannot hold."""
    return InputError(f"the model of {run.folder} cannot be written as {name}", why, fix)


def check_outputs(run: FinishedRun, name: str, got: torch.Tensor) -> None:
    """Raises OtherOutputs unless a folder's model gives the run's own outputs for `run.rows`."""
    inputs, expected = run.rows
    error = float("nan")
    if got.shape == expected.shape:
        counted = counted_rows(run.model, expected, inputs)  # at padding, implementations of attention differ
        pair = [as_rows(run.model, one, inputs) for one in (got, expected)]
        got, expected = pair if counted is None else [one[counted] for one in pair]
        error = float((got - expected).abs().max() / expected.abs().max().clamp(min=1e-12))
    if not error <= SAME:
        raise OtherOutputs(
            f"the model of {run.folder} cannot be written as {name}",
            f"the library's own model gives other outputs (they differ by {error:.1e} of the largest)",
            "use onnx/ of the run with onnxruntime, or optin_export.load_model",
        )
