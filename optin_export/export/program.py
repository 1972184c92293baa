"""Export the dense model as a torch program (.pt2): graph and weights in one file, without the model's source."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import nn

from optin_export.errors import InputError
from optin_export.export.experts import experts_by_gather
from optin_export.export.forgetting import forget_shapes
from optin_export.models import Inputs, TaskModel
from optin_export.workdir.files import atomic_path
from optin_export.workdir.torch_files import sink

#: Smallest upper bound of a free size. torch excludes 1 at first: with a maximum of 2, one size is left, and code
#: that makes a number of it (`len(x)`) would put this number into the graph, without an error.
SMALLEST_MAXIMUM = 3


@dataclass(frozen=True)
class Program:
    """Facts about an exported program: nodes of its graph, and its size."""

    nodes: int
    bytes: int


def export_program(model: TaskModel, inputs: Inputs, path: Path, *, max_batch: int, sequence: int | None) -> Program:
    """Export `model` to `path` with batch 1..max_batch and, for text, sequence 2..sequence.

    Attention is torch's fused attention, its fastest implementation. inputs: examples with at least two rows; they are
    not kept in the file. Raises InputError if torch cannot export the model.
    """
    batch = torch.export.Dim("batch", min=1, max=max(max_batch, SMALLEST_MAXIMUM))
    dynamic: dict[str, dict[int, Any]] = {name: {0: batch} for name in inputs}
    if sequence is not None:
        length = torch.export.Dim("sequence", min=2, max=max(sequence, SMALLEST_MAXIMUM))
        for axes in dynamic.values():
            axes[1] = length
    try:
        with fused_attention(model), experts_by_gather(model), torch.no_grad():
            model(**inputs)  # as in `export_onnx`: what modules keep is computed before
            program = _any_size(model, inputs, dynamic)
    except Exception as error:  # torch.export raises many types; all mean this model cannot be exported
        why = f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"[:300]
        raise InputError("torch cannot export the model", why, "remove the targets with engine: torch") from error
    _clean(program)
    with atomic_path(path) as temporary, sink(temporary) as file:
        torch.export.save(program, cast(Any, file), extra_files={"outputs": model.output_name})
    forget_shapes(program)
    return Program(len(program.graph.nodes), path.stat().st_size)


def _any_size(model: TaskModel, inputs: Inputs, dynamic: dict[str, dict[int, Any]]) -> torch.export.ExportedProgram:
    """The exported program. Where Python's own functions turn a size into a number (`len(x)`), torch.export refuses it
    unless it reads the code in its strict mode, which refuses more code otherwise."""
    try:
        return torch.export.export(model, (), dict(inputs), dynamic_shapes=dynamic)
    except Exception:  # of many types; `export_program` reports the first one, which says more to a user
        with contextlib.suppress(Exception):
            return torch.export.export(model, (), dict(inputs), dynamic_shapes=dynamic, strict=True)
        raise


def _clean(program: torch.export.ExportedProgram) -> None:
    """Drop the user's rows, and stack traces, which reveal where files are on this machine."""
    program.example_inputs = None
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                node.meta.pop("stack_trace", None)


@runtime_checkable
class _ChoosesAttention(Protocol):
    def set_attn_implementation(self, name: str) -> None: ...


@contextlib.contextmanager
def fused_attention(model: nn.Module) -> Iterator[None]:
    """Use scaled dot product attention in the body, if the model has it. Everywhere else models use plain products,
    which masks and hooks can observe and engines fuse."""
    chooses = [part for part in model.modules() if isinstance(part, _ChoosesAttention)]
    plain = [part for part in model.modules() if vars(part).get("fused_attn") is False]
    chosen = []
    for chooser in chooses:
        with contextlib.suppress(ValueError, ImportError):  # an architecture without sdpa is not changed
            chooser.set_attn_implementation("sdpa")
            chosen.append(chooser)
    for part in plain:
        vars(part)["fused_attn"] = True
    try:
        yield
    finally:
        for chooser in chosen:
            chooser.set_attn_implementation("eager")
        for part in plain:
            vars(part)["fused_attn"] = False
