"""Ship a run that passed as a Triton model repository with a manifest.

Independent of scores. Modules: `origin` (a finished run), `models` and `ensemble` (the served models), `config`
(config.pbtxt), `served/` (files that run in the server), `repository` and `journal` (staging, swap, rollback),
`manifest`, `bom` and `signing` (verification).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from optin_export import lazy

if TYPE_CHECKING:
    from optin_export.ship.manifest import add_reports, check_manifest, write_manifest
    from optin_export.ship.models import files_of
    from optin_export.ship.origin import Origin, summary_of
    from optin_export.ship.own_config import check_own
    from optin_export.ship.preprocess import write_preprocess
    from optin_export.ship.protobuf import check_tools
    from optin_export.ship.repository import put_in_order, remove, roll_back
    from optin_export.ship.shipping import Shipped, ship_models, ship_to_store

__all__ = [
    "Origin",
    "Shipped",
    "add_reports",
    "check_manifest",
    "check_own",
    "check_tools",
    "files_of",
    "put_in_order",
    "remove",
    "roll_back",
    "ship_models",
    "ship_to_store",
    "summary_of",
    "write_manifest",
    "write_preprocess",
]

__getattr__, __dir__ = lazy.names(
    __name__,
    {
        "manifest": "add_reports check_manifest write_manifest",
        "models": "files_of",
        "origin": "Origin summary_of",
        "own_config": "check_own",
        "preprocess": "write_preprocess",
        "protobuf": "check_tools",
        "repository": "put_in_order remove roll_back",
        "shipping": "Shipped ship_models ship_to_store",
    },
)
