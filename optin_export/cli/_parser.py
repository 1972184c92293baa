"""Parsing of a command line whose errors are those of the package: what happened, why, and what to do."""

from __future__ import annotations

import argparse
from typing import NoReturn

from optin_export.errors import InputError


class Parser(argparse.ArgumentParser):
    """Raises InputError where argparse would print the usage and end the process."""

    def error(self, message: str) -> NoReturn:
        what, colon, why = message.partition(": ")
        raise InputError(
            f"cannot read the command line of {self.prog}",
            message if not colon or not what.startswith("argument ") else f"{what.removeprefix('argument ')}: {why}",
            f"see {self.prog} --help",
        )
