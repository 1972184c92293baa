"""The words that may stand in place of a recipe on the command line, one file each.

A command's module offers `EPILOG`, `add_arguments(parser)` and `run(options) -> exit code`; what it imports beyond
argparse it imports in `run`, so that `--help` is quick.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from optin_export.cli._parser import Parser
from optin_export.errors import InputError

__all__ = ["COMMANDS", "main", "parse", "parser_of", "refuse_misspelt"]

#: Name -> what it does, in one line. A recipe whose file has such a name is written ./name.
COMMANDS = {
    "init": "write a first recipe, with comments: asks, or takes flags",
    "doctor": "what this machine can build and run, what is missing, and the line that adds it",
    "explain": "what a field of a recipe means: type, default, allowed values, an example",
    "check": "judge a finished run by gates of your own, for release pipelines",
    "schema": "print a JSON schema, for editors",
    "completion": "print the completion script of a shell",
    "families": "list the architectures that can be pruned, and the units that may go from each",
    "compare": "show finished runs side by side on one page, and which of them no other beats",
    "measure": "measure a finished run on this machine: engines are built here from its ONNX files",
    "ship": "write a finished run into a Triton model repository",
    "rollback": "put back what the last shipment of a model replaced",
    "verify": "check every file of a run or a model repository against its manifest",
    "serve": "try a run out on a local Triton Inference Server",
    "clean": "delete what runs can be without, and say how much that frees",
    "client": "measure two served models from the outside: latency, throughput, and every answer",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `optin-export`; returns the exit code."""
    from optin_export.cli import app

    return app.main(arguments)


def parse(name: str, arguments: list[str]) -> argparse.Namespace:
    """The options of one command; `options.work(options)` does it and returns the exit code."""
    return parser_of(name).parse_args(arguments)


def parser_of(name: str) -> argparse.ArgumentParser:
    module: Any = importlib.import_module(f"{__name__}.{name}")
    text = COMMANDS[name]
    parser = Parser(prog=f"optin-export {name}", description=text[:1].upper() + text[1:] + ".", epilog=module.EPILOG)
    module.add_arguments(parser)
    parser.add_argument("--json", action="store_true", help="result as JSON on standard output")
    parser.set_defaults(verbose=False, work=module.run)
    return parser


def refuse_misspelt(word: str) -> None:
    """Raises InputError for a word that is neither a file nor a path, and nearly a command."""
    near = difflib.get_close_matches(word.lower(), COMMANDS, n=2, cutoff=0.6)
    if near and not Path(word).suffix and not os.path.lexists(word) and "/" not in word:
        raise InputError(
            f"there is no command and no recipe '{word:.60}'",
            "no file has this name, and no command is spelt so",
            f"did you mean `optin-export {'` or `optin-export '.join(near)}`?",
        )
