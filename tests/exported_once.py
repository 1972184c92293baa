"""Runs of tests export each model once: what the exporter wrote for the same model, inputs and sizes is copied.

Half of the time of a run on a tiny model goes into torch's ONNX exporter, and most runs of tests have the same few
models. It concerns the stage `export` of a run, and the trials of a latency table; tests of the exporter call it
themselves.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optin_export.export import Exported

#: Tests of these folders ask whether the same comes out of the exporter, or what becomes of it when it fails.
REAL = ("tests/export/", "tests/robust/")
#: The environment variable by which processes that tests start find the folder (`tests/short/sitecustomize.py`).
FOLDER = "OPTIN_EXPORT_TEST_EXPORTS"
#: What of a module's attributes a graph can depend on, and is the same in every process.
PLAIN = (bool, int, float, complex, str, bytes, type(None))


def key_of(model: Any, inputs: dict[str, Any], sizes: dict[str, Any]) -> str:
    """Hash of all that a graph depends on: the modules with their settings, the weights, the inputs and the sizes."""
    total = hashlib.sha256(json.dumps(sizes, sort_keys=True).encode())
    for name, module in model.named_modules():
        settings = {key: _plain(value) for key, value in vars(module).items() if not key.startswith("_")}
        kind = type(module)
        total.update(repr((name, kind.__module__, kind.__qualname__, sorted(settings.items()))).encode())
    tensors = {
        **dict(model.named_parameters()),
        **dict(model.named_buffers()),
        **{f"-> {k}": v for k, v in inputs.items()},
    }
    for name, tensor in tensors.items():
        total.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
        total.update(tensor.detach().contiguous().numpy().tobytes())
    return total.hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, PLAIN):
        return value
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, dict):
        return [(str(key), _plain(one)) for key, one in value.items()]
    if hasattr(value, "to_json_string"):  # a configuration of transformers
        return value.to_json_string(use_diff=False)
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


@contextmanager
def exported_once(folder: Path) -> Iterator[None]:
    """Within it, stages `export` of this process, and of those that it starts, take from this folder what is there, and
    leave there what is not."""
    import pytest

    from optin_export.stages import export as export_stage
    from optin_export.stages import latency_trials

    shared = sharing(export_stage.export_onnx, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(FOLDER, str(folder))
        for module in (export_stage, latency_trials):
            patch.setattr(module, "export_onnx", shared)
        yield


def sharing(real: Callable[..., Exported], folder: Path) -> Callable[..., Exported]:
    """`real`, which is `export_onnx`, with the folder as its memory."""
    from optin_export import export
    from optin_export.export import Exported
    from optin_export.workdir import onnx_files

    def export_onnx(model: Any, inputs: Any, path: Path, *, max_batch: int, sequence: int | None) -> Exported:
        if os.environ.get("PYTEST_CURRENT_TEST", "").startswith(REAL):
            return real(model, inputs, path, max_batch=max_batch, sequence=sequence)
        sizes = {"max_batch": max_batch, "sequence": sequence, "limit": export.MAX_BYTES}
        key = key_of(model, dict(inputs), sizes)
        graph, facts = folder / f"{key}.onnx", folder / f"{key}.json"
        if facts.is_file():
            with onnx_files.atomic_graph(path) as temporary:
                shutil.copyfile(graph, temporary)
            told = json.loads(facts.read_text())
            return Exported(**{**told, "inputs": tuple(told["inputs"])})
        found = real(model, inputs, path, max_batch=max_batch, sequence=sequence)
        if not onnx_files.is_external(path):
            for place, write in ((graph, lambda to: shutil.copyfile(path, to)), (facts, _writer(asdict(found)))):
                mine = folder / uuid.uuid4().hex
                write(mine)
                mine.replace(place)  # workers of a test session share the folder
        return found

    return export_onnx


def _writer(content: Any) -> Callable[[Path], Any]:
    return lambda to: to.write_text(json.dumps(content))
