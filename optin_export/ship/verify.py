"""Check a run or a whole model repository against its manifests."""

from __future__ import annotations

from pathlib import Path

from optin_export.errors import InputError
from optin_export.ship.manifest import NAME, check_manifest, read_manifest
from optin_export.ship.repository import models_of
from optin_export.ship.signing import check_signature


def check_folder(folder: Path, key: Path | None = None) -> dict[str, list[str]]:
    """Problems per run or model; empty lists if nothing changed. key: public key for the models' signatures.

    In a repository, unknown models and missing models are problems as well. Raises InputError if nothing in `folder`
    has a manifest.
    """
    if (folder / NAME).is_file():
        return {folder.name or str(folder): _check(folder, key)}
    models = models_of(folder) if folder.is_dir() else []
    if not models:
        raise InputError(
            f"nothing in {folder} was written by optin-export",
            f"neither it nor a folder in it has a {NAME}",
            "give a run, a model repository or a model",
        )
    found = {model.name: _check(model, key) for model in models}
    around = [f"{path.name}: not shipped by optin-export" for path in sorted(folder.iterdir()) if path not in models]
    around += [f"{name}: missing, it was shipped together with {other}" for name, other in _missing(models).items()]
    if around:
        found["."] = around
    return found


def _missing(models: list[Path]) -> dict[str, str]:
    """Missing models -> an existing one whose manifest names them."""
    there, missing = {model.name for model in models}, {}
    for model in models:
        try:
            shipped = read_manifest(model).get("shipment", [])
        except InputError:
            continue  # reported by `_check`
        for name in shipped if isinstance(shipped, list) else ():
            if isinstance(name, str) and name not in there:
                missing[name] = model.name
    return missing


def _check(folder: Path, key: Path | None) -> list[str]:
    if folder.is_symlink():
        return ["a link, not a folder"]
    problems = check_manifest(folder)
    if key is not None and (reason := check_signature(folder, key)) is not None:
        problems.append(reason)
    return problems
