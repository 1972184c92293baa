"""`optin-export completion`: what makes a shell complete this command line, written from the parsers themselves."""

from __future__ import annotations

import argparse

SHELLS = ("bash", "zsh", "fish")
EPILOG = (
    'bash: eval "$(optin-export completion bash)" in ~/.bashrc; zsh: optin-export completion zsh > a folder of $fpath '
    "as _optin-export; fish: optin-export completion fish > ~/.config/fish/completions/optin-export.fish"
)
#: Names of options and arguments that are paths, by what shtab calls them.
_FILES = {"recipe", "key", "sign_key", "reference", "import_perf_analyzer", "gates", "junit", "data", "evaluation"}
_FOLDERS = {"out", "run", "to", "repository", "folder", "environment"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=SHELLS)


def run(options: argparse.Namespace) -> int:
    print(script(options.shell), end="")
    return 0


def script(shell: str) -> str:
    """The completion script of a shell: commands, options, their values, and files."""
    import shtab

    text = shtab.complete(_whole_parser(), shell)
    if shell == "bash":
        # The first word is a command or a recipe: where no command fits, bash completes files.
        text = text.replace("complete -o bashdefault -F", "complete -o default -F")
    return text if text.endswith("\n") else text + "\n"


def _whole_parser() -> argparse.ArgumentParser:
    """One parser for commands and recipes, which the command line itself tells apart by the first word."""
    from optin_export.cli import COMMANDS, parser_of
    from optin_export.cli.app import recipe_parser

    whole = recipe_parser(named=False)
    commands = whole.add_subparsers(metavar="RECIPE or COMMAND")
    parsers = [
        commands.add_parser(name, help=text, parents=[parser_of(name)], add_help=False, conflict_handler="resolve")
        for name, text in COMMANDS.items()
    ]
    for parser in (whole, *parsers):
        for action in parser._actions:
            _mark(action)
    return whole


def _mark(action: argparse.Action) -> None:
    """Say what completes an option: a file, a folder, or a field of the recipe."""
    import shtab

    from optin_export.cli.explain import EXIT_CODES
    from optin_export.recipe.manual import describe_fields

    if action.dest == "field":
        action.choices = [*describe_fields(), EXIT_CODES]
    for kind, names in ((shtab.FILE, _FILES), (shtab.DIRECTORY, _FOLDERS)):
        if action.dest in names:
            action.complete = kind  # type: ignore[attr-defined]
