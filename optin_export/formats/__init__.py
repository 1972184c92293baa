"""Write a finished run as a folder that other libraries load without this package.

`run` opens it, and each other `*_folder` module writes one format; `changes` and `runtime` describe a pruned model by
its differences from its library's; `card` writes README.md.
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Callable
from pathlib import Path

from optin_export.errors import EnvironmentLacks, InputError
from optin_export.formats.card import write_card
from optin_export.formats.graph_folder import write_optimum
from optin_export.formats.run import FinishedRun, open_run, unfit
from optin_export.formats.sentence_folder import write_sentence
from optin_export.formats.timm_folder import write_timm
from optin_export.formats.transformers_folder import write_transformers

__all__ = ["FORMATS", "export_run", "write_folder"]

_Write = Callable[[FinishedRun, Path, str], None]
#: Format -> (library of the model, what writes the folder).
FORMATS: dict[str, tuple[str, _Write]] = {
    "hf": ("transformers", write_transformers),
    "sentence-transformers": ("transformers", write_sentence),
    "optimum": ("transformers", write_optimum),
    "timm": ("timm", write_timm),
}
_OTHER = {"transformers": "hf", "timm": "timm"}


def export_run(folder: Path, format: str, to: Path) -> Path:
    """Write the pruned model of the run in `folder` to the new folder `to`, and return that.

    The folder appears when it is complete. Raises InputError for an unknown format, one that does not fit the model,
    or a folder that exists; EnvironmentLacks for a full disk.
    """
    if format not in FORMATS:
        raise InputError(f"there is no format '{format:.40}'", "it is not one of the known ones", f"use {_known()}")
    if to.exists():
        raise InputError(f"{to} exists", "the export writes a new folder", "delete it, or name another one with --to")
    return write_folder(open_run(folder), format, to)


def write_folder(run: FinishedRun, format: str, to: Path) -> Path:
    """The same for a run that is open, and a format and a folder that were checked."""
    library, write = FORMATS[format]
    _check_library(run, format, library)
    draft = to.parent / f".tmp-{secrets.token_hex(8)}"
    try:
        draft.mkdir(parents=True)
        write(run, draft, format)
        if not (draft / "onnx").exists():
            run.copy_onnx(draft)
        write_card(run, draft, format)
        draft.rename(to)
    except OSError as error:
        raise EnvironmentLacks(
            f"cannot write {to}", error.strerror or str(error), "free disk space, or name another folder with --to"
        ) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return to


def _known() -> str:
    return ", ".join(FORMATS)


def _check_library(run: FinishedRun, format: str, library: str) -> None:
    found = run.base["library"]
    if found == "python":
        raise unfit(
            run,
            format,
            "your own Python function builds it, so no other library can",
            "load it with optin_export.load_model(FOLDER/model, trust_python=True), or use onnx/ with onnxruntime",
        )
    if found != library:
        raise unfit(run, format, f"it is a model of {found}", f"use --format {_OTHER[found]}")
