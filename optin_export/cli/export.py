"""`optin-export export`: write a finished run as a folder that other libraries load."""

from __future__ import annotations

import json
from pathlib import Path

import click

from optin_export.cli._group import PATH, command, run_argument


@command
@run_argument
@click.option(
    "--format",
    "name",
    metavar="FORMAT",
    required=True,
    help="hf (transformers), sentence-transformers, optimum (onnxruntime) or timm.",
)
@click.option("--to", type=PATH, metavar="FOLDER", help="The new folder (default: RUN-FORMAT).")
def export(run: Path, name: str, to: Path | None, as_json: bool) -> int:
    """Write a finished run as a folder that other libraries load.

    RUN is the folder of a finished run. The folder holds weights, configuration, tokenizer or processor, the ONNX graph
    and a model card, and loads without optin_export. It is written only if the library gives the run's own outputs.
    """
    from optin_export.formats import export_run

    folder = export_run(run, name, to or run.resolve().with_name(f"{run.resolve().name}-{name}"))
    if as_json:
        print(json.dumps({"folder": str(folder), "format": name, "files": _files(folder)}))
    else:
        print(f"{folder}: {', '.join(_files(folder))}")
        print(f"how to load it: {folder / 'README.md'}")
    return 0


def _files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
