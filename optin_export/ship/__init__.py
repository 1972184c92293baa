"""ship: a passed verdict becomes a Triton model repository and a manifest. Knows nothing of scores."""

from __future__ import annotations

from optin_export.ship.manifest import check_manifest, write_manifest
from optin_export.ship.triton import check_tools, write_repository

__all__ = ["check_manifest", "check_tools", "write_manifest", "write_repository"]
