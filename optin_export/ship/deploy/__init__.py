"""Files around a shipped repository: an image, compose, Kubernetes and KServe, alert rules, and a dashboard.

Starting points that fit the shipment: model names, image, flags, memory as it was measured. `write` never changes the
repository.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from optin_export.errors import InputError
from optin_export.recipe import Recipe
from optin_export.ship.deploy.cluster import kserve, kubernetes
from optin_export.ship.deploy.container import compose, dockerfile
from optin_export.ship.deploy.facts import SERVER_MIB, Facts, facts_of
from optin_export.ship.deploy.monitoring import dashboard, prometheus, rules
from optin_export.ship.shipping import Shipped
from optin_export.workdir.files import write_text

__all__ = ["Facts", "documents", "facts_of", "write"]

_HEADER = "# Written by `optin-export ship --deploy` for {name}. Yours to edit: only --replace overwrites it.\n"


def documents(facts: Facts) -> dict[str, str]:
    """The text of every file by its name."""
    header = _HEADER.format(name=facts.name)
    models = "the models as measured" if facts.exact else "NOT the models, which were not measured: raise it"
    memory = f"# Memory: {SERVER_MIB} MiB assumed for the server itself, {models}, and a quarter more.\n"
    several = {
        "compose.yaml": [compose(facts)],
        "kubernetes.yaml": kubernetes(facts),
        "kserve.yaml": kserve(facts),
        "prometheus.yaml": [prometheus()],
        "alerts.yaml": [rules(facts)],
        "grafana/datasources.yaml": [
            {
                "apiVersion": 1,
                "datasources": [{"name": "Prometheus", "type": "prometheus", "url": "http://prometheus:9090"}],
            }
        ],
        "grafana/dashboards.yaml": [
            {
                "apiVersion": 1,
                "providers": [{"name": "optin-export", "type": "file", "options": {"path": "/dashboards"}}],
            }
        ],
    }
    return {
        "Dockerfile": header + dockerfile(facts),
        **{
            name: header + (memory if name in ("kubernetes.yaml", "kserve.yaml") else "") + _yaml(parts)
            for name, parts in several.items()
        },
        "grafana/dashboard.json": json.dumps(dashboard(facts), indent=2) + "\n",
    }


def write(folder: Path, shipped: Shipped, recipe: Recipe, replace: bool = False) -> list[Path]:
    """Write the files of a shipment into `folder`; returns their paths.

    Raises InputError for a folder inside the repository, and for files that exist and differ, unless `replace`.
    """
    if folder.resolve().is_relative_to(shipped.repository.resolve()):
        raise InputError(
            f"{folder} is in the model repository",
            "Triton takes every folder in it for a model",
            "use another --deploy",
        )
    texts = documents(facts_of(shipped, recipe, folder))
    own = [
        name for name, text in texts.items() if (folder / name).exists() and (folder / name).read_text("utf-8") != text
    ]
    if own and not replace:
        raise InputError(
            f"{folder / own[0]} exists and differs",
            "it may hold your own changes",
            "write to another folder, or overwrite it with --replace",
        )
    for name, text in texts.items():
        write_text(folder / name, text)
    return [folder / name for name in texts]


def _yaml(parts: list[dict[str, Any]]) -> str:
    """Documents of one YAML file, in the style that yamllint's defaults accept."""
    return "".join(
        "---\n" + yaml.dump(part, Dumper=_Indented, sort_keys=False, width=2**16, default_flow_style=False)
        for part in parts
    )


class _Indented(yaml.SafeDumper):
    """Lists are indented below their key, and nothing is an alias of something else."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)

    def ignore_aliases(self, data: Any) -> bool:
        return True
