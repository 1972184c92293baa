"""Runs of a very small recipe in forked children of a process that has imported everything: a run takes two seconds.

Executed as a program of its own (`python -m tests.robust.forked`), because a process with threads cannot be forked.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from optin_export.displays import Quiet
from tests.shortly import measure_shortly

VIT = {"img_size": 16, "patch_size": 8, "in_chans": 1, "num_classes": 3, "embed_dim": 16, "depth": 2, "num_heads": 2}


def write_recipe(folder: Path, **sections: Any) -> Path:
    """A tiny ViT with random weights on random images, with every stage that a run can have: also a repository."""
    import numpy as np
    import yaml

    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (24, 16, 16), dtype=np.uint8)
    np.savez(folder / "images.npz", images=images, labels=generator.integers(0, 3, 24))
    source = {"source": f"npz:{folder / 'images.npz'}"}
    recipe = {
        "recipe": 1,
        "name": "tiny",
        "model": {
            "source": "timm:vit_tiny_patch16_224",
            "task": "image-classification",
            "weights": "random",
            "args": VIT,
            "preprocess": {"size": [16, 16], "mean": [0.5], "std": [0.5]},
        },
        "data": {"calibration": source, "evaluation": {**source, "metric": "accuracy"}},
        "prune": {"budget": {"macs": 0.7}, "probes": 4, "rows": 16, "score_samples": 8, "curve_samples": 8, "align": 1},
        "export": {"batch": [1, 2]},
        "gates": {"accuracy_drop": 100.0, "other_work": 1.0},
        "ship": {"triton": True},
        **sections,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


def warm_up(recipe: Path) -> None:
    """Import all that a run imports, so that forked children share it; blocks are short."""
    import importlib

    import torch

    torch.set_num_threads(1)
    # Those that a run imports late.
    for name in ("stages.pipeline", "report", "ship.models", "export.program"):
        importlib.import_module(f"optin_export.{name}")
    for name in ("timm.data", "onnx", "onnxscript", "onnxruntime", "torch_pruning", "torch.onnx", "torch._dynamo"):
        importlib.import_module(name)
    for name in ("tritonclient.grpc.model_config_pb2", "matplotlib.pyplot", "torchmetrics", "scipy.optimize"):
        importlib.import_module(name)
    for name in ("torch.onnx._internal.exporter._core", "torch.onnx.ops", "onnxscript.optimizer", "transformers"):
        importlib.import_module(name)
    measure_shortly()
    # The exporter fills caches of its own with its first graph.
    from optin_export.data import load_sources
    from optin_export.export import export_onnx
    from optin_export.recipe import load_recipe

    sources = load_sources(load_recipe(recipe))
    with tempfile.TemporaryDirectory() as folder:
        export_onnx(sources.model, sources.fixed(2), Path(folder) / "a.onnx", max_batch=2, sequence=None)


def run(recipe: Path, out: Path, events: int | None = None, **options: Any) -> None:
    """A whole run; a byte goes down the pipe `events` whenever a stage starts."""
    import optin_export

    optin_export.run(recipe, out, display=None if events is None else Signals(events), **options)


class Signals(Quiet):
    """A display that tells another process which stage has started."""

    def __init__(self, pipe: int) -> None:
        self.pipe = pipe

    def start(self, stage: str) -> None:
        super().start(stage)
        os.write(self.pipe, f"{stage}\n".encode())

    def warn(self, text: str) -> None:
        os.write(self.pipe, f"warning {text}\n".encode())


def fork(work: Callable[[], None]) -> int:
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            import torch

            # torch replaces its pool of threads after a fork, and does so safely in the main thread only.
            torch.set_num_threads(1)
            work()
            code = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return pid


def wait(pid: int) -> int:
    """Exit code of a child; negative: the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill_at(recipe: Path, out: Path, stage: str, delay: float) -> tuple[bool, float]:
    """Run in a child, SIGKILL it `delay` seconds into `stage`; whether it was still in it, and how long it took."""
    reading, writing = os.pipe()
    child = fork(lambda: run(recipe, out, writing))
    os.close(writing)
    begun = ended = 0.0
    with os.fdopen(reading, "rb", buffering=0) as pipe:
        for line in iter(pipe.readline, b""):
            now = time.monotonic()
            if line.startswith(b"warning"):
                continue
            if line.decode().strip() == stage:
                begun = now
                import select

                ready, _, _ = select.select([pipe], [], [], delay)
                if not ready:
                    os.kill(child, signal.SIGKILL)
                    break
            elif begun and not ended:
                ended = now
    code = wait(child)
    return code == -signal.SIGKILL, (ended - begun) if ended else delay


def kill_many(recipe: Path, folder: Path, kills: int, seed: int) -> dict[str, Any]:
    """Kill runs in one folder again and again, each in a stage at a random moment, then let the run end.

    Half of the kills are followed by a finished run, which has to be that of an undisturbed run; the other half by the
    next kill. Returns counts per stage, and the hashes of what has to be equal.
    """
    from optin_export.workdir.files import sha256_file
    from optin_export.workdir.run_directory import STAGES, leftovers

    names = ("plan/plan.json", "onnx/pruned.onnx", "onnx/base.onnx", "model/model.safetensors")
    generator = random.Random(seed)
    whole, out = folder / "whole", folder / "killed"
    lengths: dict[str, float] = {}
    for stage in STAGES:  # how long each takes, to hit it
        lengths[stage] = 0.0
    reading, writing = os.pipe()
    child = fork(lambda: run(recipe, whole, writing))
    os.close(writing)
    times: list[tuple[str, float]] = []
    with os.fdopen(reading, "rb", buffering=0) as pipe:
        for line in iter(pipe.readline, b""):
            times.append((line.decode().strip(), time.monotonic()))
    times.append(("", time.monotonic()))
    assert wait(child) == 0
    for (stage, start), (_, end) in itertools.pairwise(times):
        lengths[stage] = end - start
    expected = {name: sha256_file(whole / name) for name in names}
    hit = dict.fromkeys(STAGES, 0)
    done = left = 0
    tries = 0
    while done < kills or not all(hit.values()):
        tries += 1
        assert tries < 6 * kills, f"stages end before they can be killed: {hit}"
        stage = STAGES[tries % len(STAGES)]
        if generator.random() < 0.5:
            reset(out, generator)
        killed, _ = kill_at(recipe, out, stage, generator.uniform(0, 0.9 * lengths[stage]))
        left += len(leftovers(out)) if out.exists() else 0
        done += killed
        hit[stage] += killed
        if generator.random() < 0.25 or done == kills:
            assert wait(fork(lambda: run(recipe, out))) == 0
            found = {name: sha256_file(out / name) for name in names}
            assert found == expected, f"after {done} kills: {found}"
            assert leftovers(out) == []
            assert sorted(files(out)) == sorted(files(whole))
    return {"kills": done, "hit": hit, "left_and_cleared": left, "equal": sorted(expected)}


def reset(out: Path, generator: random.Random) -> None:
    """What stages did before is there to be reused, or not: a random part of the records goes, or everything."""
    import shutil

    if generator.random() < 0.3:
        shutil.rmtree(out, ignore_errors=True)
        return
    for record in sorted((out / ".stages").glob("*.json")) if out.exists() else ():
        if generator.random() < 0.5:
            record.unlink()


def files(folder: Path) -> list[str]:
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return [name for name in found if name != ".stages/lock"]


if __name__ == "__main__":
    kills, seed = int(sys.argv[1]), int(sys.argv[2])
    with tempfile.TemporaryDirectory(prefix="killed-") as place:
        path = write_recipe(Path(place))
        warm_up(path)
        print(json.dumps(kill_many(path, Path(place), kills, seed)))
