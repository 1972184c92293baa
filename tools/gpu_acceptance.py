#!/usr/bin/env python3
"""Everything that a machine with an NVIDIA GPU can tell, offline, in under eight minutes: one JSON with all raw blocks.

    python tools/gpu_acceptance.py --out docs/measurements/gpu/<gpu>.json && python tools/studies/render_results.py
    python tools/gpu_acceptance.py --rehearse --out /tmp/rehearsal.json   # the same code, tiny sizes, on the CPU

It says how long each part may take. The same command again goes on after the parts that are done (`--again` does not).

Parts: scoring (the sketch against exact masking), torch, onnxruntime, tensorrt, tensorrt_rtx. Each is a process of its
own with a limit of seconds, writes after every result, and skips what no longer fits: one that fails, hangs or breaks
the GPU's context never stops the others. What is not installed or failed is in the JSON with its reason.

Weights are random, so nothing is downloaded and nothing is said of accuracy: the pruned models have the shapes that
the search gives for random scores at 0.7 and 0.5 of the MACs. torch runs the models in fp32, fp16 and bf16; the engines
that are built from ONNX run in fp32, at 0.5, those of TensorRT at batch 8 and 64. Blocks are shorter and fewer than in
a run, to have many cells: see `measured_by`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

PARTS = {"scoring": 80, "torch": 170, "onnxruntime": 70, "tensorrt": 110, "tensorrt_rtx": 30}
#: What `--rehearse` allows each part on a small and busy CPU; with two cores to itself it takes about 20 s each.
REHEARSAL_SECONDS = 240
RATIOS, PRECISIONS, BATCHES = (0.7, 0.5), ("fp32", "fp16", "bf16"), (1, 8, 64, 256)
#: The ways of calling an engine that are measured here: as a caller sees it, and the engine alone.
MODES = ("call", "device+graph")
BLOCKS, BLOCK_SECONDS, WARM_UP_SECONDS = 12, 0.01, 0.1
#: Probes of the sketch, samples and token rows of the scoring part, and units per group that exact masking is timed on.
SAMPLES, ROWS, EXACT_UNITS = 32, 768, 16


@dataclass(frozen=True)
class Case:
    """A model of random weights: architecture as `sources.build` takes it, and the shape of one sample."""

    architecture: dict[str, Any]
    sample: tuple[int, ...]

    @property
    def is_text(self) -> bool:
        return len(self.sample) == 1


def timm_case(name: str, size: int = 224, **args: Any) -> Case:
    return Case({"library": "timm", "name": name, "args": args, **_task("image-classification")}, (3, size, size))


def bert_case(sequence: int = 128, **config: Any) -> Case:
    import transformers

    settings = transformers.BertConfig(**config).to_dict()
    architecture = {"library": "transformers", "class": "BertForSequenceClassification", "config": settings}
    return Case({**architecture, **_task("text-classification")}, (sequence,))


def mask2former_case(size: int = 384) -> Case:
    """Mask2Former with Swin-T, in the sizes of facebook/mask2former-swin-tiny-ade-semantic."""
    import transformers

    backbone = transformers.SwinConfig(
        embed_dim=96,
        depths=[2, 2, 6, 2],
        num_heads=[3, 6, 12, 24],
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    settings = transformers.Mask2FormerConfig(backbone_config=backbone, num_labels=150).to_dict()
    architecture = {"library": "transformers", "class": "Mask2FormerForUniversalSegmentation", "config": settings}
    return Case({**architecture, **_task("image-segmentation")}, (3, size, size))


def _task(task: str) -> dict[str, Any]:
    return {"task": task, "pooling": None, "normalize": False}


def cases(rehearsal: bool) -> dict[str, Callable[[], Case]]:
    if rehearsal:
        small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
        tiny = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 32, "num_heads": 4, "num_classes": 5}
        return {
            "DeiT-Tiny": lambda: timm_case("deit_tiny_patch16_224", 32, **tiny),
            "BERT-base": lambda: bert_case(16, vocab_size=64, **small),
        }
    return {
        "DeiT-Tiny": lambda: timm_case("deit_tiny_patch16_224"),
        "BERT-base": bert_case,
        "DeiT-Base": lambda: timm_case("deit_base_patch16_224"),
        "DeiT-Small": lambda: timm_case("deit_small_patch16_224"),
        "Swin-T": lambda: timm_case("swin_tiny_patch4_window7_224"),
        "Mask2Former": mask2former_case,
    }


def inputs_of(case: Case, batch: int) -> dict[str, Any]:
    """Random rows on the host; text without padding."""
    import torch

    generator = torch.Generator().manual_seed(batch)
    if not case.is_text:
        return {"pixel_values": torch.randn(batch, *case.sample, generator=generator)}
    ids = torch.randint(5, 60, (batch, *case.sample), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def models_of(case: Case, ratios: tuple[float, ...]) -> dict[str, Any]:
    """{'base', '0.7', ...}: the model, and dense models with that share of its MACs at most."""
    import numpy as np
    import torch

    from optin_export.models import build
    from optin_export.pruning.rebuild import rebuild
    from optin_export.recipe import Budget, TokensSection
    from optin_export.repair import scheduled
    from optin_export.search import find_plan
    from optin_export.units import find_structure

    torch.manual_seed(0)
    base = build(case.architecture)
    structure = find_structure(base)
    _, costs = scheduled(base, structure, TokensSection(), inputs_of(case, 1))
    generator = np.random.default_rng(0)
    scores = {group.key: generator.random(group.count) for group in structure.groups}
    align = {group.key: group.step(8) for group in structure.groups}
    least = {group.key: min(group.step(8), group.count) for group in structure.groups}
    found = {"base": base}
    for ratio in ratios:
        plan = find_plan(scores, costs, Budget(macs=ratio), align, least)
        found[str(ratio)], _ = rebuild(base, structure, plan.groups, inputs_of(case, 2))
    return found


# The parts. Each is a generator of entries; an entry with a `failed` says why.


def scoring_part(rehearsal: bool, left: Callable[[], float]) -> Iterator[dict[str, Any]]:
    """Seconds of `score: optin` for a whole model, with and without autocast, against exact masking of its units."""
    import torch

    models = cases(rehearsal)
    if not rehearsal:
        models = {"BERT-base": models["BERT-base"], "ViT-B": lambda: timm_case("vit_base_patch16_224")}
    device = "cpu" if rehearsal or not torch.cuda.is_available() else "cuda"
    for name, make in models.items():
        case = make()
        for autocast in (None, "bfloat16"):
            with _failing({"model": name, "autocast": autocast, "device": device}) as entry:
                if left() > 0:
                    entry |= _score(case, autocast, device, rehearsal)
                else:
                    entry["failed"] = "no time was left"
            yield entry


def _score(case: Case, autocast: str | None, device: str, rehearsal: bool) -> dict[str, Any]:
    import numpy as np
    import torch

    from optin_export.data import Batch
    from optin_export.models import build
    from optin_export.recipe import PruneSection
    from optin_export.scoring import score
    from optin_export.scoring.exact import exact_sums
    from optin_export.scoring.optin import observe_all
    from optin_export.units import find_structure

    torch.manual_seed(0)
    model = build(case.architecture).to(device)
    samples = 4 if rehearsal else SAMPLES
    rows = {name: tensor.to(device) for name, tensor in inputs_of(case, samples).items()}
    batches, structure = [Batch(rows, np.arange(samples))], find_structure(model)
    section = PruneSection.model_validate({"budget": {"macs": 0.5}, "rows": ROWS, "autocast": autocast})

    def timed(work: Callable[[], Any]) -> tuple[float, Any]:
        _synchronize()
        start = time.perf_counter()
        result = work()
        _synchronize()
        return time.perf_counter() - start, result

    model(**rows)  # libraries are loaded, and memory is taken, by the first pass
    seconds, scores = timed(lambda: score(model, structure, batches, section, 0))
    # Now: it is observed when it is asked for, and the clock below is that of the masked passes alone.
    [reference] = observe_all(model, structure, batches, ROWS, torch.Generator().manual_seed(0))
    exact, subset = 0.0, 0
    for group in structure.groups:
        units = np.linspace(0, group.count - 1, min(EXACT_UNITS, group.count)).astype(int).tolist()
        took, _ = timed(lambda group=group, units=units: exact_sums(model, structure, group, reference, 1.0, units))
        exact += took * group.count / len(units)
        subset += len(units)
    return {
        "seconds": seconds,
        "exact_seconds": exact,
        "exact_measured_units": subset,
        "units": sum(group.count for group in structure.groups),
        "samples": samples,
        "info": scores.info,
    }


def torch_part(rehearsal: bool, left: Callable[[], float]) -> Iterator[dict[str, Any]]:
    """The models themselves with fused attention, not exported: that takes too long for so many."""
    import torch

    from optin_export.engines.torch import TorchEngine
    from optin_export.export.program import fused_attention
    from optin_export.recipe import Target

    on_gpu = torch.cuda.is_available() and not rehearsal
    target = Target.model_validate({"engine": "torch", "device": "cuda" if on_gpu else "cpu"})
    ratios, precisions, batches = _sizes(rehearsal)
    for name, make in cases(rehearsal).items():
        models: dict[str, Any] = {}
        case = make()
        with _failing({"model": name, "target": target.name}) as entry:
            models = models_of(case, ratios)
        if "failed" in entry:
            yield entry
            continue
        for precision in precisions if name == "BERT-base" or not rehearsal else precisions[:1]:
            held = {which: _in_precision(model, precision, target.device) for which, model in models.items()}
            named = (tuple(inputs_of(case, 1)), (models["base"].output_name,), target)
            engines = {which: partial(TorchEngine, model, *named) for which, model in held.items()}
            with contextlib.ExitStack() as stack:
                for model in held.values():
                    stack.enter_context(fused_attention(model))
                yield from _cells(case, name, precision, engines, batches, target.name, left)
            del engines, held


def onnx_part(engine: str, rehearsal: bool, left: Callable[[], float]) -> Iterator[dict[str, Any]]:
    """Engines that are built from ONNX, in fp32: of the models, as many as there is time for."""
    import torch

    from optin_export import engines
    from optin_export.export import export_onnx
    from optin_export.recipe import Target

    on_gpu = torch.cuda.is_available() and not rehearsal
    options: dict[str, Any] = {"engine": engine}
    if engine == "onnxruntime" and on_gpu:
        options["device"] = "cuda"
    if engine == "tensorrt-rtx" and not on_gpu:
        options["tensorrt"] = {"compute_capabilities": ["8.9"]}
    target = Target.model_validate(options)
    ratios, _, batches = _sizes(rehearsal)
    if engine != "onnxruntime":
        batches = batches[1:3]  # every batch size is a profile that is tuned by itself: all would take the whole time
    with _failing({"target": target.name}) as entry:
        entry["versions"] = engines.versions(target)
    yield entry
    if "failed" in entry:
        return
    models = cases(rehearsal)
    if rehearsal:
        models = {"BERT-base": models["BERT-base"]}  # exports take most of the time
    for name, make in models.items():
        with tempfile.TemporaryDirectory() as folder, _failing({"model": name, "target": target.name}) as entry:
            if left() <= 0:
                entry["failed"] = "no time was left"
            else:
                case = make()
                loaded: dict[str, Any] = {}
                entry["build_seconds"] = {}
                shapes = [{n: tuple(t.shape) for n, t in inputs_of(case, batch).items()} for batch in batches]
                for which, model in models_of(case, ratios[-1:]).items():
                    onnx = Path(folder) / f"{which}.onnx"
                    sequence = case.sample[0] if case.is_text else None
                    export_onnx(model, inputs_of(case, 2), onnx, max_batch=max(batches), sequence=sequence)
                    path, start = engines.artefact(Path(folder), target, which), time.perf_counter()
                    entry.setdefault("facts", {})[which] = engines.build(onnx, target, path, shapes)
                    entry["build_seconds"][which] = time.perf_counter() - start
                    if engines.unavailable(target) is None:
                        loaded[which] = partial(engines.load, path, target)
                entry["unmeasured"] = engines.unavailable(target)
                if loaded:
                    entry["cells"] = list(_cells(case, name, "fp32", loaded, batches, target.name, left))
        yield entry


def _sizes(rehearsal: bool) -> tuple[tuple[float, ...], tuple[str, ...], tuple[int, ...]]:
    return (RATIOS[-1:], PRECISIONS, (1, 2)) if rehearsal else (RATIOS, PRECISIONS, BATCHES)


def _cells(
    case: Case,
    name: str,
    precision: str,
    loads: dict[str, Callable[[], Any]],
    batches: tuple[int, ...],
    target: str,
    left: Callable[[], float],
) -> Iterator[dict[str, Any]]:
    """One entry per batch size, share of MACs and mode: a latency with its raw blocks."""
    from optin_export.engines import modes
    from optin_export.measure.gpu import GpuLog, memory_of
    from optin_export.measure.latency import LatencySettings, measure_latency

    log = GpuLog()
    for batch in batches:
        inputs = {key: tensor.numpy() for key, tensor in inputs_of(case, batch).items()}
        for which in [one for one in loads if one != "base"]:
            for mode in [one for one in MODES if one in modes(loads["base"]())]:
                about = {"model": name, "macs": float(which), "precision": precision, "batch": batch, "mode": mode}
                with _failing({**about, "target": target}) as entry:
                    if left() <= 0:
                        entry["failed"] = "no time was left"
                    else:
                        log.entries = []
                        sequence = case.sample[0] if case.is_text else None
                        settings = LatencySettings(target, batch, sequence, 0, mode)
                        pair = loads["base"], loads[which]
                        result = measure_latency(*pair, inputs, settings, after_block=log.read).to_json()
                        entry["latency"] = {**result, "samples": _rounded(result["samples"])}
                        entry["clocks"], entry["clocks_note"] = log.entries, log.note
                        if mode == "call" and target.endswith("cuda"):
                            entry["memory"] = {key: memory_of(loads[key](), inputs) for key in ("base", which)}
                yield entry


def _rounded(samples: dict[str, list[list[float]]]) -> dict[str, list[list[float]]]:
    """To ten nanoseconds: no clock here is finer, and the file stays small."""
    return {arm: [[round(value, 5) for value in block] for block in blocks] for arm, blocks in samples.items()}


def _in_precision(model: Any, precision: str, device: str) -> Any:
    """A copy on the device whose weights and activations are of that type; the output is float32, as of engines."""
    import copy

    import torch

    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]

    class InPrecision(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = copy.deepcopy(model).to(device, dtype)

        def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
            fitted = {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs.items()}
            return self.model(**fitted).float()

    return InPrecision().eval()


def _synchronize() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


@contextlib.contextmanager
def _failing(entry: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The entry, with the reason in it if the body fails."""
    try:
        yield entry
    except Exception as error:  # whatever a library raises, the next cell is tried
        entry["failed"] = f"{type(error).__name__}: {error}"[:600]
        entry["traceback"] = traceback.format_exc()[-2000:]


def run_part(part: str, seconds: float, rehearsal: bool, out: Path) -> None:
    """In a process of its own: write every entry to `out` as soon as it is there."""
    from optin_export.measure import latency
    from optin_export.workdir.files import write_text

    latency.BLOCKS = latency.MAX_BLOCKS = BLOCKS
    latency.BLOCK_SECONDS, latency.WARM_UP_SECONDS, latency.ATTEMPTS = BLOCK_SECONDS, WARM_UP_SECONDS, 1
    end = time.monotonic() + seconds

    def left() -> float:
        return end - time.monotonic()

    if part == "scoring":
        found = scoring_part(rehearsal, left)
    elif part == "torch":
        found = torch_part(rehearsal, left)
    else:
        found = onnx_part(part.replace("_", "-"), rehearsal, left)
    entries: list[dict[str, Any]] = []
    for entry in found:
        entries.append(entry)
        write_text(out, json.dumps(entries))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the JSON to write")
    parser.add_argument("--rehearse", action="store_true", help="the same code on the CPU, with tiny sizes")
    parser.add_argument("--again", action="store_true", help="measure again what --out already has")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="only these")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part is not None:
        run_part(options.part, options.seconds, options.rehearse, options.out)
        return
    from optin_export.engines import gpu_name
    from optin_export.environment import describe
    from optin_export.workdir.files import write_text

    gpu = None if options.rehearse else gpu_name()
    if gpu is None and not options.rehearse:
        sys.exit("there is no NVIDIA GPU with a working driver here; --rehearse runs tiny sizes on the CPU")
    result: dict[str, Any] = {
        "version": 2,
        "written": time.strftime("%Y-%m-%d", time.gmtime()),
        "rehearsal": options.rehearse,
        "machine": {**describe(), "gpu": gpu},
        "measured_by": {"blocks": BLOCKS, "block_seconds": BLOCK_SECONDS, "warm_up_seconds": WARM_UP_SECONDS},
        "parts": {} if options.again else done_before(options.out, gpu, options.rehearse),
    }
    limits = {part: REHEARSAL_SECONDS if options.rehearse else PARTS[part] for part in options.parts}
    todo = [part for part in options.parts if part not in result["parts"]]
    for part in options.parts:
        print(f"{part:<14}" + (f"at most {limits[part]} s" if part in todo else "done before"), file=sys.stderr)
    print(f"all together  at most {sum(limits[part] for part in todo) / 60:.1f} min", file=sys.stderr)
    for part in todo:
        print(f"{part} ...", file=sys.stderr, flush=True)
        found = in_process(part, limits[part], options.rehearse)
        result["parts"][part] = found
        write_text(options.out, json.dumps(result) + "\n")
        print(f"{part}: {found['seconds']} s, {told(found)}", file=sys.stderr, flush=True)
    print(options.out)


def done_before(out: Path, gpu: str | None, rehearsal: bool) -> dict[str, Any]:
    """The parts in a file of an earlier, interrupted call on this GPU, without those that failed."""
    try:
        known = json.loads(out.read_text(encoding="utf-8"))
        if (known["version"], known["machine"]["gpu"], known["rehearsal"]) == (2, gpu, rehearsal):
            return {part: found for part, found in known["parts"].items() if found["failed"] is None}
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return {}


def told(found: dict[str, Any]) -> str:
    """What a part has in one phrase: its results, and the first reason of those that are missing."""
    every = [cell for entry in found["entries"] for cell in (entry, *entry.get("cells", ()))]
    reasons = [reason for one in every if (reason := one.get("failed") or one.get("unmeasured"))]
    words = [f"{len(every) - len(reasons)} results"]
    if reasons:
        words.append(f"{len(reasons)} missing: {reasons[0].splitlines()[0][:100]}")
    return ", ".join([*words, *([found["failed"]] if found["failed"] else [])])


def in_process(part: str, seconds: float, rehearsal: bool) -> dict[str, Any]:
    """Run one part; its entries, how long it took, and how it ended if not well."""
    with tempfile.TemporaryDirectory() as folder:
        out, start = Path(folder) / "part.json", time.monotonic()
        words = [sys.executable, __file__, "--part", part, "--out", str(out), "--seconds", str(0.85 * seconds)]
        ended = None
        try:
            done = subprocess.run(
                [*words, *(["--rehearse"] if rehearsal else [])], timeout=seconds, stderr=subprocess.PIPE, text=True
            )
            if done.returncode != 0:
                ended = f"exit code {done.returncode}: {done.stderr[-1000:]}"
        except subprocess.TimeoutExpired:
            ended = f"stopped after {seconds} s"
        entries = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else []
    return {"seconds": round(time.monotonic() - start, 1), "failed": ended, "entries": entries}


if __name__ == "__main__":
    main()
