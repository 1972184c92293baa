"""The command line: `run.py` runs a recipe, and each other command has a separate file.

`app.py` turns a command's errors into exit codes; `_group.py` finds the command that the first word names.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `optin-export`.

    Args:
        arguments: the words after `optin-export`; by default those of this process.

    Returns:
        The exit code (`errors.EXIT_CODES`).
    """
    from optin_export.cli import app

    return app.main(arguments)
