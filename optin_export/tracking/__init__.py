"""Write a finished run into the tracker that a team uses: its parameters, metrics and files.

`values` flattens the report; each other module knows one tracker, and imports it inside its one function.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from optin_export.errors import EnvironmentLacks
from optin_export.tracking.values import Values, values_of

__all__ = ["TRACKERS", "Values", "check", "log_run", "values_of"]

#: Tracker -> the package that it needs, and the name of its extra.
TRACKERS = {"mlflow": "mlflow", "wandb": "wandb", "tensorboard": "tensorboard"}


def check(tracker: str) -> None:
    """Raises EnvironmentLacks if the tracker's package is not installed: to be known before a run, not after it."""
    package = TRACKERS[tracker]
    if find_spec(package) is None:
        raise EnvironmentLacks(
            f"cannot log to {tracker}",
            f"the package {package} is not installed",
            f"pip install 'optin-export[{tracker}]', or leave out --log {tracker}",
        )


def log_run(tracker: str, run: Path) -> str:
    """Write the finished run in this folder into the tracker.

    Returns:
        Where it is now, for people.

    Raises:
        InputError: there is no readable report.
        EnvironmentLacks: the tracker cannot be reached.
    """
    check(tracker)
    log: Callable[[Values, Path], str] = import_module(f"optin_export.tracking.to_{tracker}").log
    values = values_of(run)
    try:
        return log(values, run)
    except Exception as error:  # a tracker's client raises errors of its own and of its transport
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise EnvironmentLacks(
            f"{run} could not be logged to {tracker}",
            f"{type(error).__name__}: {first:.300}",
            "the run itself is complete; repeat the command with --log once the tracker works: all stages are reused",
        ) from error
