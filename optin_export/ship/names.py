"""Names that a model of a repository can have."""

from __future__ import annotations

import re

from optin_export.errors import InputError

#: Allowed names of folders in a model repository: a leading dot would hide them, blanks and slashes break URLs.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def check_name(name: str) -> None:
    """Raises InputError for a name that Triton, its URLs or its repository cannot handle."""
    if not _NAME.fullmatch(name) or len(name) > 200:
        raise InputError(
            f"'{name[:60]}' cannot name a Triton model", "use letters, digits, '.', '_' and '-'", "set name, or --name"
        )
