"""The command in a forked child of a process that has imported everything, for study_kills.py.

Importing takes longer than most of what is killed. A child begins where the command begins after its imports, so that
kills meet what it does. The parent computes nothing: a process with threads could not be forked.
"""

from __future__ import annotations

import importlib
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch
from kills_process import Victim, surroundings
from short_measuring import command

#: What a run or a shipment imports late.
LATE = (
    *(
        f"optin_export.{name}"
        for name in ("stages.pipeline", "stages.sweep", "report", "ship.models", "export.program")
    ),
    *("timm.data", "onnx", "onnxscript", "onnxruntime", "torch_pruning", "torch.onnx", "torch._dynamo", "transformers"),
    *("tritonclient.grpc.model_config_pb2", "matplotlib.pyplot", "torchmetrics", "scipy.optimize"),
    *("torch.onnx._internal.exporter._core", "torch.onnx.ops", "onnxscript.optimizer"),
)


def warm_up() -> None:
    for name in LATE:
        importlib.import_module(name)


class _Child:
    """Of `subprocess.Popen` what a Victim needs."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, seconds: float) -> int:
        end = time.monotonic() + seconds
        while self.poll() is None:
            if time.monotonic() > end:
                raise TimeoutError("it has been killed, and has not ended")
            time.sleep(0.001)
        assert self.returncode is not None
        return self.returncode


class Forked(Victim):
    """A Victim without an interpreter of its own to start."""

    def start(self, words: Sequence[str], place: Path, temporary: Path) -> _Child:  # type: ignore[override]
        pid = os.fork()
        if pid:
            while os.getpgid(pid) != pid:  # until it has its own group: a kill would meet ours
                time.sleep(0.0002)
            return _Child(pid)
        code = 1
        try:
            os.setsid()
            with self.log.open("wb") as errors, (place / "stdout").open("wb") as output:
                os.dup2(errors.fileno(), 2)
                os.dup2(output.fileno(), 1)
            os.environ.update(surroundings(place, temporary))
            tempfile.tempdir = str(temporary)
            torch.set_num_threads(1)
            code = command(words)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
