"""The words that may stand in place of a recipe on the command line, one file each.

A command's module offers `EPILOG`, `add_arguments(parser)` and `run(options) -> exit code`; what it imports beyond
argparse it imports in `run`, so that `--help` is quick.
"""

from __future__ import annotations

import argparse
import importlib
from typing import Any

__all__ = ["COMMANDS", "parse"]

#: Name -> what it does, in one line. A recipe whose file has such a name is written ./name.
COMMANDS = {
    "families": "list the architectures that can be pruned, and the units that may go from each",
    "compare": "show finished runs side by side on one page, and which of them no other beats",
    "measure": "measure a finished run on this machine: engines are built here from its ONNX files",
    "ship": "write a finished run into a Triton model repository",
    "rollback": "put back what the last shipment of a model replaced",
    "verify": "check every file of a run or a model repository against its manifest",
    "serve": "try a run out on a local Triton Inference Server",
    "client": "measure two served models from the outside: latency, throughput, and every answer",
}


def parse(name: str, arguments: list[str]) -> argparse.Namespace:
    """The options of one command; `options.work(options)` does it and returns the exit code."""
    module: Any = importlib.import_module(f"{__name__}.{name}")
    text = COMMANDS[name]
    parser = argparse.ArgumentParser(
        prog=f"optin-export {name}", description=text[:1].upper() + text[1:] + ".", epilog=module.EPILOG
    )
    module.add_arguments(parser)
    parser.add_argument("--json", action="store_true", help="result as JSON on standard output")
    parser.set_defaults(verbose=False, work=module.run)
    return parser.parse_args(arguments)
