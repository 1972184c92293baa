"""The cache of steps in a run folder, by content: a step is skipped only if all its inputs are unchanged.

This is the only cache of results. Damaged results are made again, with a warning.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import cache, lru_cache
from pathlib import Path
from types import CodeType
from typing import Any, TypeVar

from pydantic import TypeAdapter

from optin_export.environment import libraries
from optin_export.workdir.files import atomic_path, read_json, regular, sha256_file, sha256_json, write_json
from optin_export.workdir.onnx_files import SUFFIX as DATA
from optin_export.workdir.onnx_files import data_file

#: The packages in the order in which data passes through them; each imports from earlier ones only.
LAYERS = (
    "recipe",
    "models",
    "data",
    "units",
    "objective",
    "scoring",
    "search",
    "pruning",
    "repair",
    "export",
    "engines",
    "measure",
    "ship",
    "serving",
    "report",
)
FOLDER = ".stages"
#: Outside the layers, but part of every step: they decide what a step reads and writes.
_COMMON = ("stages", "sentence", "tables.py", "textfiles.py", "workdir/onnx_files.py")
#: Steps whose results the runs of a sweep share: they are the longest, and equal in many runs.
SHARED = ("scoring", "curves", "export.base", "export.program.base")
RECORD = "step.json"
Result = TypeVar("Result")


@lru_cache
def code_hash(layer: str) -> str:
    """Hash of the source of a layer, all layers before it and the stages: the code that a step can depend on.

    Only executed code counts: comments, docstrings and layout do not.
    """
    package = Path(__file__).parents[1]
    total = hashlib.sha256()
    for name in (*LAYERS[: LAYERS.index(layer) + 1], *_COMMON):
        for file in sorted((package / name).rglob("*.*")) if (package / name).is_dir() else [package / name]:
            if file.is_file() and file.suffix in (".py", ".j2"):
                source = file.read_bytes()
                code = executed_code(source) if file.suffix == ".py" else source
                total.update(f"{file.relative_to(package)}".encode() + code)
    return total.hexdigest()


@cache  # every stage needs the hash of nearly all files
def executed_code(source: bytes) -> bytes:
    """Hash of a Python source's executed code: its bytecode without docstrings, assertions and line numbers."""
    total = hashlib.sha256()
    codes = [compile(source, "source", "exec", dont_inherit=True, optimize=2)]
    for code in codes:
        codes += (value for value in code.co_consts if isinstance(value, CodeType))
        total.update(code.co_code + code.co_exceptiontable)
        names = code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars, code.co_qualname
        counts = code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags
        total.update(repr((names, counts, _constant(code.co_consts))).encode())
    return total.digest()


def _constant(value: Any) -> Any:
    """A constant of the bytecode in a form whose repr is equal in every process, unlike the order of a set."""
    if isinstance(value, CodeType):
        return "code"
    if isinstance(value, tuple):
        return tuple(map(_constant, value))
    return sorted(map(repr, value)) if isinstance(value, frozenset) else value


def computed_by(layer: str) -> dict[str, Any]:
    """The code that computes a step of this layer: a hash of the package's code, and versions of its libraries."""
    return {"code": code_hash(layer), "libraries": libraries()}


def _copy(source: Path, path: Path) -> None:
    """Copy the file atomically; does nothing if there is no source."""
    if source.is_file():
        with atomic_path(path) as temporary:
            shutil.copyfile(source, temporary)


#: Files that a step writes, or a function that returns them once the step is done.
Outputs = Sequence[Path] | Callable[[], Sequence[Path]]


def _files(outputs: Outputs) -> Sequence[Path]:
    return outputs() if callable(outputs) else outputs


class StepCache:
    """The finished steps in one run folder. `changed` is called once, before the first step that is not reused.

    warn: receives each warning in one line, such as a damaged result. warnings: those lines.
    shared: a folder in which the runs of a sweep share the steps named in SHARED, by their key.
    """

    def __init__(
        self,
        run: Path,
        force: bool,
        changed: Callable[[], None],
        warn: Callable[[str], None] = lambda text: None,
        shared: Path | None = None,
    ) -> None:
        self.run, self.force, self._changed, self._warn, self.shared = run, force, changed, warn, shared
        self.executed, self._warned = 0, False
        self.warnings: list[str] = []

    def step(
        self,
        layer: str,
        name: str,
        inputs: Mapping[str, Any],
        outputs: Outputs,
        work: Callable[[], Result],
        kind: type[Result] | None = None,
    ) -> Result:
        """The result of `work`, which writes `outputs`; reused if nothing that it depends on has changed.

        inputs: JSON-serialisable, with files given by their hash (`sha256_file`). The step also depends on this
        package's code, the versions of the libraries that compute, and the outputs themselves. outputs: the written
        files; a function if only the work decides which files these are. kind: type of the result, a dataclass or a
        dictionary (None: any type); if the previous record holds another type, the step is done again.
        """
        read = TypeAdapter(kind or dict[str, Any])
        key = sha256_json({"name": name, "inputs": inputs, **computed_by(layer)})
        record = self.run / FOLDER / f"{name}.json"
        if not self.force and (result := self._reuse(record, key, outputs, read)) is not None:
            return result
        if not self._warned:
            self._changed()
            self._warned = True
        shared = self.shared / key[:32] if self.shared is not None and name in SHARED else None
        if shared is not None and not self.force:
            self._take(shared, record)
            if (result := self._reuse(record, key, outputs, read)) is not None:
                return result
        self.executed += 1
        result = work()
        written = _files(outputs)
        files = {path.relative_to(self.run).as_posix(): sha256_file(path) for path in written}
        sizes = {name: (self.run / name).stat().st_size for name in files}
        plain = json.loads(json.dumps(result, default=asdict))  # as JSON: tuples become lists, and all keys text
        write_json(record, {"key": key, "files": files, "bytes": sizes, "result": plain, "sha256": sha256_json(plain)})
        if shared is not None:
            for path in written:
                _copy(path, shared / path.relative_to(self.run))
            _copy(record, shared / RECORD)  # last: without the record nothing is reused
        return result

    def _take(self, shared: Path, record: Path) -> None:
        """Copy this step's files from another run of the sweep that finished it; delete weights of an earlier graph."""
        try:
            files = dict(read_json(shared / RECORD)["files"])
        except (OSError, ValueError, KeyError, TypeError):
            return
        for name in files:
            _copy(shared / name, self.run / name)
            if name.endswith(".onnx") and f"{name}{DATA}" not in files:
                data_file(self.run / name).unlink(missing_ok=True)
        _copy(shared / RECORD, record)

    def _reuse(self, record: Path, key: str, outputs: Outputs, read: TypeAdapter[Any]) -> Any:
        name = record.relative_to(self.run).as_posix()
        try:
            entry = read_json(record)
            same, files = entry["key"] == key, dict(entry["files"])
            sizes = dict(entry.get("bytes", {}))  # a file of another size is not read: it may be endless
            if same and entry["sha256"] != sha256_json(entry["result"]):
                raise ValueError("its result is not what was written")
            result = read.validate_python(entry["result"]) if same else None
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            self.warn(f"{name} cannot be read ({type(error).__name__}); its step is done again")
            return None
        if not same:
            return None
        unnamed = next((path for path in _files(outputs) if path.relative_to(self.run).as_posix() not in files), None)
        if unnamed is not None:
            self.warn(f"{name} does not name {unnamed.name}; its step is done again")
            return None
        for output, digest in files.items():
            try:
                size = regular(self.run / output).stat().st_size
                found = sha256_file(self.run / output) if sizes.get(output, size) == size else None
            except OSError as error:
                self.warn(f"{output} cannot be read ({error.strerror}); it is made again")
                return None
            if found != digest:
                self.warn(f"{output} is not what was written (its sha256 is another); it is made again")
                return None
        return result

    def warn(self, text: str) -> None:
        """Issue a warning in one line, once, and keep it for the report."""
        if text in self.warnings:
            return
        self.warnings.append(text)
        self._warn(text)
