"""Code that runs in the workers' processes: hold work, process items of it, and report the cost."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import socket
import time
from collections.abc import Callable
from typing import Any

from optin_export.workdir.measurement_lock import Machine

#: worker: its name; seconds; gpus: number it holds; bytes: size of the result, if it is arrays; printed: lines.
Facts = dict[str, Any]


class Worker:
    """An actor. payload: the pickled work, a function of one item. threads: torch threads for one item."""

    def __init__(self, payload: bytes, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self.work: Callable[[Any], Any] = pickle.loads(payload)

    def hello(self) -> str:
        return name()

    def do(self, item: Any) -> tuple[Any, Facts]:
        """Process an item and return the result. Waits while another process measures on this machine."""
        with Machine().busy():
            return recorded(self.work, item)


def recorded(function: Callable[..., Any], *args: Any) -> tuple[Any, Facts]:
    """Call the function; returns (its result, facts about the call)."""
    printed = io.StringIO()
    start = time.perf_counter()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        found = function(*args)
    facts = {
        "worker": name(),
        "seconds": time.perf_counter() - start,
        "gpus": len(list(filter(None, os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")))),
        "bytes": sum(getattr(one, "nbytes", 0) for one in found.values()) if isinstance(found, dict) else 0,
        "printed": printed.getvalue().splitlines(),
    }
    return found, facts


def name() -> str:
    """The worker's name: host and process."""
    return f"{socket.gethostname()}-{os.getpid()}"
