"""`optin-export completion`: the script with which a shell completes this command line."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from optin_export.cli._group import COMPLETION_VARIABLE, PROGRAM, command


@command
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str, as_json: bool) -> int:
    """Print the script that completes this command in your shell.

    \b
    bash: eval "$(optin-export completion bash)" in ~/.bashrc
    zsh:  optin-export completion zsh > FOLDER_IN_FPATH/_optin-export
    fish: optin-export completion fish > ~/.config/fish/completions/optin-export.fish
    """
    from optin_export.cli.run import optin_export

    found = get_completion_class(shell)
    assert found is not None
    print(found(optin_export, {}, PROGRAM, COMPLETION_VARIABLE).source())
    return 0
