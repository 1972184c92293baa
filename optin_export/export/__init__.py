"""Export a dense model to a checked ONNX file; independent of engines.

Uses torch's dynamo exporter with a dynamic batch (and, for text, a dynamic sequence length); inputs are named after
the forward's arguments. onnx.checker checks the graph, and everything that identifies this machine is removed.
"""

from __future__ import annotations

import contextlib
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from optin_export.errors import InputError, OptinError
from optin_export.export.experts import experts_by_gather
from optin_export.export.forgetting import forget_shapes
from optin_export.export.graph_file import read_graph
from optin_export.export.precision import Converted, convert, converters, weight_bits
from optin_export.export.program import SMALLEST_MAXIMUM, export_program
from optin_export.export.promotion import differences_of_floats
from optin_export.export.sampling import sampling_by_gather
from optin_export.models import Inputs, TaskModel
from optin_export.workdir.onnx_files import MAX_BYTES, atomic_graph, graph_bytes

__all__ = [
    "OPSET",
    "Converted",
    "Exported",
    "convert",
    "converters",
    "export_onnx",
    "export_program",
    "read_graph",
    "weight_bits",
]

OPSET = 20
#: Shortest sequences for which a graph is traced, in turn: code that shifts tokens may need more than two. Parity
#: compares at two tokens nevertheless (`measure.SHORT`).
LEAST_SEQUENCES = (2, 4)


@dataclass(frozen=True)
class Exported:
    """Facts about an ONNX file: its inputs and outputs, how many nodes it has, and its size."""

    inputs: tuple[str, ...]
    output: str
    nodes: int
    bytes: int
    opset: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def export_onnx(model: TaskModel, inputs: Inputs, path: Path, *, max_batch: int, sequence: int | None) -> Exported:
    """Export `model` to `path` with batch 1..max_batch and, for text, sequence 2..sequence.

    Weights of more than 2 GiB are stored in a separate file in the same folder (`onnx_files`). inputs: real example
    inputs with at least two rows (one row would fix the batch size in the graph).
    Raises InputError if the exporter or the checker refuses the model.
    """
    try:
        with _quiet(), sampling_by_gather(), differences_of_floats(), experts_by_gather(model):
            program = _exported(model, inputs, max_batch, sequence)
        with atomic_graph(path) as temporary:
            nodes = _save(program, temporary)
        forget_shapes(program.exported_program)
    except OptinError:
        raise
    except Exception as error:  # exporter and checker raise many types; all mean this model cannot be exported
        raise InputError(
            "the model cannot be exported to ONNX",
            _reason(error),
            "check the versions of torch and onnxscript, or simplify the operation named above",
        ) from error
    return Exported(tuple(inputs), model.output_name, nodes, graph_bytes(path), OPSET)


def _exported(model: TaskModel, inputs: Inputs, max_batch: int, sequence: int | None) -> Any:
    """The exporter's program, with free sizes. Raises InputError if the model's code fixes one of them."""
    with torch.no_grad():
        model(**inputs)  # modules may compute tensors in their first pass and keep them: no graph can assign these
    program, fixed = _traced(model, inputs, max_batch, sequence)
    if fixed is not None:
        with contextlib.suppress(Exception):  # many types; each means that the first program is what can be had
            second, still = _traced(model, inputs, max_batch, sequence, strict=True)
            if still is None:
                return second
        raise InputError(
            "the model cannot be exported to ONNX",
            f"the graph would take {fixed} only, because the model's code depends on this size",
            "change the model's code so that it does not depend on sizes or values of one input",
        )
    return program


def _traced(
    model: TaskModel, inputs: Inputs, max_batch: int, sequence: int | None, *, strict: bool = False
) -> tuple[Any, str | None]:
    """The exporter's program with free sizes, and the sizes that it takes if not all.

    strict: where Python's own functions turn a size into a number (`len(x)`), following the calls of the example fixes
    this size. torch.export's strict mode reads the code instead and keeps it, but refuses more code and takes longer.
    """
    batch = torch.export.Dim("batch", min=1, max=max(max_batch, SMALLEST_MAXIMUM))
    if sequence is None:
        dynamic: dict[str, dict[int, Any]] = {name: {0: batch} for name in inputs}
        program = _program(model, inputs, dynamic, strict)
        return program, _fixed_size(program, dynamic)
    odd = _odd_length(inputs)
    if odd is not None:
        with contextlib.suppress(Exception):  # the model's code may not take such a length
            program, fixed = _of_texts(model, odd, batch, sequence, strict)
            if fixed is None or strict:
                return program, fixed
    return _of_texts(model, inputs, batch, sequence, strict)


def _odd_length(inputs: Inputs) -> Inputs | None:
    """The texts without their last token, if their length is even; None otherwise.

    Code that pads to a multiple (of a window, or a block) skips that for an example of such a length, and the graph
    then takes no other. The exporter keeps the branch that the example takes.
    """
    length = next(iter(inputs.values())).shape[1]
    if length % 2 or length <= LEAST_SEQUENCES[-1]:
        return None
    return {name: tensor[:, :-1].contiguous() for name, tensor in inputs.items()}


def _of_texts(model: TaskModel, inputs: Inputs, batch: Any, sequence: int, strict: bool) -> tuple[Any, str | None]:
    """As `_traced`, for texts of any length up to `sequence`."""
    for least in LEAST_SEQUENCES:
        length = torch.export.Dim("sequence", min=least, max=max(sequence, least + 1))
        dynamic = {name: {0: batch, 1: length} for name in inputs}
        program = _program(model, inputs, dynamic, strict)
        fixed = _fixed_size(program, dynamic)
        if fixed is None:
            break
    return program, fixed


def _program(model: TaskModel, inputs: Inputs, dynamic: dict[str, dict[int, Any]], strict: bool) -> Any:
    code: torch.nn.Module | torch.export.ExportedProgram = model
    if strict:
        code = torch.export.export(model, (), dict(inputs), dynamic_shapes=dynamic, strict=True)
    program = torch.onnx.export(
        code,
        (),
        kwargs=dict(inputs),
        input_names=list(inputs),
        output_names=[model.output_name],
        dynamic_shapes=dynamic,
        opset_version=OPSET,
        dynamo=True,
        optimize=True,
        verbose=False,
    )
    assert program is not None
    return program


def _fixed_size(program: Any, dynamic: Mapping[str, Mapping[int, Any]]) -> str | None:
    """The batches or sequences that the graph takes, if it does not take all: the exporter falls back on the example's
    sizes, without an error, where a model's code makes them constants."""
    for value in program.model.graph.inputs:
        for axis, dim in dynamic.get(value.name, {}).items():
            if isinstance(size := value.shape[axis], int):
                return f"{'batches' if dim.__name__ == 'batch' else 'sequences'} of {size}"
    return None


_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


def _reason(error: BaseException) -> str:
    """The first line of the first cause: the exporter's own error only says in which of its steps that happened."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = _COLOURS.sub("", str(error)).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].strip() if lines else ''}"[:300]


def _save(program: Any, path: Path) -> int:
    """Check, clean and write an exported graph; its weights go into a separate file if protobuf cannot hold them all.

    Returns the number of nodes. Nothing above protobuf's limit is ever serialised as a message: the checker and shape
    inference read the graph without its weights.
    """
    import onnx

    model = program.model
    _clean(model)
    weights = sum(tensor.nbytes for value in model.graph.initializers.values() if (tensor := value.const_value))
    # The rest of the message is left for the graph itself.
    program.save(path, external_data=weights > MAX_BYTES - MAX_BYTES // 16)
    onnx.checker.check_model(str(path), full_check=True)
    return int(model.graph.num_nodes())


def _clean(model: Any) -> None:
    """Drop stack traces and file names: they differ between machines and reveal where the user's files are."""
    from onnx_ir.convenience import create_value_mapping
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    ClearMetadataAndDocStringPass()(model)
    for one in (model, *create_value_mapping(model.graph).values()):
        one.metadata_props.clear()
        one.doc_string = None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the exporter's warnings, which address its own developers."""
    names = ("torch.onnx", "torch.export", "torch._guards", "torch._dynamo", "torch.fx", "onnxscript", "onnx_ir")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
