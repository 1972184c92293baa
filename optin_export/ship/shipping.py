"""Write a finished run into a model repository: all its models, or none."""

from __future__ import annotations

import datetime
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import replace as replace_fields
from pathlib import Path
from typing import Any

from optin_export.ship import ensemble
from optin_export.ship.bom import write_bom
from optin_export.ship.footprint import footprints
from optin_export.ship.images import Image, server_image
from optin_export.ship.manifest import write_manifest
from optin_export.ship.models import has_ensemble, kinds_of, served_as, shipment
from optin_export.ship.names import check_name
from optin_export.ship.origin import Origin
from optin_export.ship.protobuf import check_tools
from optin_export.ship.remote import Store
from optin_export.ship.repository import Writer, install
from optin_export.ship.signing import check_key, sign


@dataclass(frozen=True)
class Shipped:
    """names: every model of the shipment; changed: models whose folder was replaced. image: of the server.

    url: of a repository in an object store; empty for a folder.
    """

    repository: Path
    names: tuple[str, ...]
    changed: tuple[str, ...]
    image: Image
    url: str = ""


def ship_models(
    origin: Origin,
    repository: Path,
    name: str | None = None,
    *,
    replace: bool = False,
    bom: bool = False,
    key: Path | None = None,
) -> Shipped:
    """Write the models of a run into a Triton model repository, all or none. key: PEM file of the signing key.

    `Origin.check`, not this function, checks that the run may ship.
    Raises InputError for a model that cannot be served or would overwrite another run, EnvironmentLacks if the disk is
    full.
    """
    check_tools()
    name = name or origin.recipe.name
    check_name(name)
    if key is not None:
        check_key(key)
    facts = origin.facts()

    written = shipment(origin, name)
    kinds = kinds_of(origin, name)
    measured = footprints(origin, ("pruned",) if origin.recipe.ship.layout == "pruned" else ("base", "pruned"))
    # Each model lists the others of its shipment, so that a missing one is detected.
    facts["shipment"] = sorted(written)

    def finished(model: str, write: Writer) -> Writer:
        def whole(folder: Path) -> None:
            write(folder)
            if bom:
                write_bom(folder, model, facts)
            created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            held = {which: measured[which] for which in kinds.get(model, ())}
            write_manifest(folder, {"name": model, "created": created, **facts, **({"instance": held} if held else {})})
            if key is not None:
                sign(folder, key)

        return whole

    models = {model: finished(model, write) for model, write in written.items()}
    changed = install(repository, models, origin.identity, replace)
    one = served_as(origin, "pruned")
    needed = ensemble.packages(origin) if has_ensemble(origin) else ()
    image = server_image(origin.recipe.ship.backend, one.library, _version(one.library, origin.environment), needed)
    return Shipped(repository, tuple(models), tuple(changed), image)


def ship_to_store(
    origin: Origin,
    url: str,
    name: str | None = None,
    *,
    replace: bool = False,
    bom: bool = False,
    key: Path | None = None,
) -> Shipped:
    """As `ship_models`, into a repository at a URL of fsspec. The upload is not atomic, and cannot be rolled back.

    Raises InputError and EnvironmentLacks as `ship_models` and `remote.Store`.
    """
    store = Store.open(url)
    with tempfile.TemporaryDirectory(prefix="optin-export-ship-") as scratch:
        local = Path(scratch) / "models"
        shipped = ship_models(origin, local, name, bom=bom, key=key)
        changed = store.upload(local, shipped.names, origin.identity, replace)
    return replace_fields(shipped, changed=tuple(changed), url=store.url)


def _version(library: str, environment: Mapping[str, Any]) -> str | None:
    packages = environment.get("packages", {})
    names = {"tensorrt_rtx": "tensorrt-rtx-cu13"}
    version = packages.get(names.get(library, library))
    return str(version) if version else None
