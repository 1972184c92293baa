"""The result of `prune`: the smaller model with its plan and report, which can be saved, exported and shown."""

from __future__ import annotations

import contextlib
import copy
import html
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from optin_export import pruning
from optin_export.errors import InputError
from optin_export.export import Exported, export_onnx
from optin_export.models import Inputs, TaskModel
from optin_export.recipe import absolute_source
from optin_export.search import Plan
from optin_export.units import Structure
from optin_export.workdir.files import Scratch


@dataclass(frozen=True, eq=False, repr=False)
class Pruned:
    """A pruned model with its plan, scores and report.

    model: a module of the given class, float32 on the CPU, in eval mode; its weights can be trained.
    plan: which units are kept.
    scores: importance of each unit of the unpruned model, float64 [units] by group (a key of `plan.groups`).
    report: JSON-serialisable: `macs` and `params` (base, pruned, ratio), `groups` (kept of count per block), `score`,
    `repair`, `notes`, and with evaluation data `accuracy`.
    """

    model: nn.Module
    plan: Plan
    scores: dict[str, np.ndarray]
    report: dict[str, Any]
    _task: TaskModel = field()
    _inputs: Inputs = field()
    _architecture: dict[str, Any] = field()
    _structure: Structure = field()
    _sequence: int | None = field()

    def save(self, folder: str | Path, *, source: str | None = None, args: Mapping[str, Any] | None = None) -> Path:
        """Write the model in its current state into a folder that `optin_export.load_model` reads; returns the folder.

        Args:
            folder: where architecture.json and model.safetensors are written, as in `model/` of a run.
            source: what builds the unpruned model, as `model.source` in a recipe: "timm:NAME" or "py:FILE.py:FUNCTION";
                not needed for transformers, and for timm only if the model was built with arguments.
            args: the arguments of `source`.

        The saved model is first rebuilt and compared. Raises InputError if the rebuilt model differs.
        """
        base = self._base(source, args)
        model = self._frozen()
        saved = model, base, self._structure, self.plan, self._inputs
        with contextlib.closing(Scratch()) as scratch:
            pruning.save_model(scratch.path / "model", *saved)
            try:
                again = pruning.load_model(scratch.path / "model", trust_python=True)
                reason = pruning.difference(model, again, self._inputs)
            except InputError as error:
                reason = error.why
        if reason is not None:
            raise InputError(
                "the saved model could not be built again",
                f"by {base.get('name') or base.get('class') or base.get('source')}: {reason}",
                "name what builds the unpruned model: save(folder, source='py:FILE.py:FUNCTION', args={...})",
            )
        pruning.save_model(Path(folder), *saved)
        return Path(folder)

    def to_onnx(self, path: str | Path, *, batch: int = 8) -> Exported:
        """Export the model in its current state to a checked ONNX file with a dynamic batch of 1 to `batch` rows.

        Its inputs and output are those that the command line exports (`pixel_values`, or `input_ids` and
        `attention_mask`). Returns facts about the file. Raises InputError if the model cannot be exported.
        """
        return export_onnx(self._frozen(), self._inputs, Path(path), max_batch=batch, sequence=self._sequence)

    def _frozen(self) -> TaskModel:
        return copy.deepcopy(self._task).cpu().float().eval().requires_grad_(False)

    def _base(self, source: str | None, args: Mapping[str, Any] | None) -> dict[str, Any]:
        """The description from which the unpruned model is built."""
        base = self._architecture
        if source is None and base["library"] == "python":
            raise InputError(
                "nothing says how the model is built again",
                "it is of no class of transformers or timm",
                "name it: save(folder, source='py:FILE.py:FUNCTION', args={...}); or torch.save(small.model, path)",
            )
        if source is None:
            return base
        source = absolute_source(source, Path.cwd(), ("timm", "py"))
        prefix, _, name = source.partition(":")
        named = {"library": "timm", "name": name} if prefix == "timm" else {"library": "python", "source": source}
        kept = {key: base[key] for key in ("task", "pooling", "normalize")}
        return {**named, "args": dict(args or {}), **kept}

    def _table(self) -> tuple[str, list[list[str]]]:
        """A headline, and a row per block with the units kept of each kind; the first row names the kinds."""
        groups = self.report["groups"].values()
        kinds = list(dict.fromkeys(group["kind"] for group in groups))
        blocks: dict[str, dict[str, str]] = {}
        for group in groups:
            blocks.setdefault(group["block"], {})[group["kind"]] = f"{group['kept']}/{group['count']}"
        named = {"macs": "MACs", "params": "parameters"}
        ratios = (f"{self.report[name]['ratio']:.1%} of the {words}" for name, words in named.items())
        rows = [[path, *(kept.get(kind, "") for kind in kinds)] for path, kept in blocks.items()]
        return f"{type(self.model).__name__} with {' and '.join(ratios)}", [["block", *kinds], *rows]

    def __repr__(self) -> str:
        headline, rows = self._table()
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([headline, *lines])

    def _repr_html_(self) -> str:
        headline, (head, *rows) = self._table()
        cells = ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
        names = "".join(f"<th>{html.escape(name)}</th>" for name in head)
        body = "".join(f"<tr>{row}</tr>" for row in cells)
        return f"<table><caption>{html.escape(headline)}</caption><tr>{names}</tr>{body}</table>"
