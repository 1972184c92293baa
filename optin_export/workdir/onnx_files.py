"""The files of a graph: NAME.onnx, and NAME.onnx.data with its weights if protobuf cannot hold them; or NAME.xml and
NAME.bin, OpenVINO's graph and its weights.

A protobuf message is limited to 2 GiB. ONNX keeps larger weights as external data: the graph refers to another file in
its folder by name, offset and length. This module writes, hashes, copies and deletes such files together.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from optin_export.errors import EnvironmentLacks
from optin_export.workdir.files import sha256_file

#: Maximum bytes of a protobuf message.
MAX_BYTES = 2**31 - 1
#: Tensors with fewer bytes stay in the graph: shapes and indices that graph passes read.
SMALL = 1024
SUFFIX = ".data"


def data_file(path: Path) -> Path:
    """Path of the weights file of the graph `path`, if its weights are external."""
    if path.suffix == ".xml":
        return path.with_suffix(".bin")
    return path.with_name(path.name + SUFFIX)


def graph_files(path: Path) -> list[Path]:
    """The graph `path`, or a file of another kind, and its weights file if it has one."""
    data = data_file(path)
    return [path, data] if data.is_file() else [path]


def graph_bytes(path: Path) -> int:
    """Bytes of a graph with its weights."""
    return sum(file.stat().st_size for file in graph_files(path))


def sha256_graph(path: Path) -> str:
    """Hash of a graph with its weights; for a single file, its sha256."""
    hashes = [sha256_file(file) for file in graph_files(path)]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def is_external(path: Path) -> bool:
    return data_file(path).is_file()


def copy_graph(source: Path, path: Path) -> None:
    """Copy a graph to `path`; the weights file of an ONNX graph keeps its name, by which the graph refers to it."""
    with _telling(path):
        shutil.copyfile(source, path)
        for data in graph_files(source)[1:]:
            shutil.copyfile(data, data_file(path) if path.suffix == ".xml" else path.parent / data.name)


def save_graph(model: Any, path: Path, external: bool = False, limit: int = MAX_BYTES) -> None:
    """Write a ModelProto with weights in memory; into a separate file if `external` or above `limit` bytes."""
    import onnx

    if external or _bytes(model) > limit:
        onnx.save_model(
            model,
            path,
            save_as_external_data=True,
            all_tensors_to_one_file=True,
            location=data_file(path).name,
            size_threshold=SMALL,
        )
    else:
        onnx.save_model(model, path)


def _bytes(model: Any) -> int:
    """Size of a ModelProto. A proto whose size protobuf cannot compute is above its limit."""
    held = sum(len(tensor.raw_data) for tensor in model.graph.initializer)
    return held if held > MAX_BYTES else int(model.ByteSize())


@contextlib.contextmanager
def atomic_graph(path: Path) -> Iterator[Path]:
    """Yield a path with the same name in a temporary sibling folder; if the body succeeds, its files replace `path`.

    Weights of an earlier graph that the new one does not need are deleted. Raises EnvironmentLacks if the folder cannot
    be written.
    """
    with _telling(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=path.parent, prefix=".tmp-"))
    try:
        yield folder / path.name
        with _telling(path):
            written = [folder / path.name, data_file(folder / path.name)]
            for file in written:
                if file.exists():
                    with file.open("rb+") as handle:
                        os.fsync(handle.fileno())
                    file.chmod(0o644)
            # The weights first, so that the graph never refers to a missing file.
            if written[1].exists():
                written[1].replace(data_file(path))
                written[0].replace(path)
            else:
                written[0].replace(path)
                data_file(path).unlink(missing_ok=True)
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _telling(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> EnvironmentLacks:
    why = error.strerror or str(error)
    return EnvironmentLacks(f"cannot write {path}", why, "free disk space or choose another folder with --out")
