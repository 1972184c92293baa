"""A CycloneDX 1.6 bill of materials of one shipped model (ML-BOM), as plain JSON.

Fields: https://cyclonedx.org/docs/1.6/json/. Without time and serial number: the same model gives the same file.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from optin_export.ship.manifest import artefacts
from optin_export.ship.origin import UNKNOWN
from optin_export.workdir.files import sha256_file, write_json

NAME = "bom.cdx.json"


def write_bom(folder: Path, name: str, facts: Mapping[str, Any]) -> None:
    """Write bom.cdx.json: the model as a machine-learning-model component, its files, its data, and the packages."""
    model, data, environment = facts["model"], facts["data"], facts["environment"]
    packages = {"optin-export": environment.get("optin_export"), **environment.get("packages", {})}
    files = [
        {
            "type": "file",
            "bom-ref": f"file:{path.relative_to(folder).as_posix()}",
            "name": path.relative_to(folder).as_posix(),
            "hashes": [{"alg": "SHA-256", "content": sha256_file(path)}],
        }
        for path in artefacts(folder)
    ]
    component = {
        "type": "machine-learning-model",
        "bom-ref": f"model:{name}",
        "name": name,
        "version": facts["recipe"]["sha256"][:12],
        "description": f"{model['source']}, pruned and exported by optin_export",
        **_licenses(model["license"]),
        "modelCard": {
            "modelParameters": {
                "task": model["task"],
                "datasets": [{"type": "dataset", "name": data["calibration"]}],
            }
        },
        "properties": [
            {"name": "optin-export:verdict", "value": "passed" if facts["verdict"]["passed"] else "failed"},
            {"name": "optin-export:recipe-sha256", "value": facts["recipe"]["sha256"]},
            {"name": "optin-export:seed", "value": str(facts["seed"])},
        ],
    }
    bom = {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": component},
        "components": [
            *files,
            {"type": "data", "bom-ref": "data:calibration", "name": data["calibration"], **_licenses(data["license"])},
            *(
                {"type": "library", "bom-ref": f"pkg:pypi/{package}@{version}", "name": package, "version": version}
                for package, version in packages.items()
                if version
            ),
        ],
    }
    write_json(folder / NAME, bom)


def _licenses(name: str) -> dict[str, Any]:
    """Licences by name, not as SPDX ids: a README's licence is not checked to be a valid id."""
    return {} if name == UNKNOWN else {"licenses": [{"license": {"name": name}}]}
