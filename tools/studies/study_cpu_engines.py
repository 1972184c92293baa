#!/usr/bin/env python3
"""Every way to run a model on one CPU, unpruned and pruned: onnxruntime, OpenVINO, bf16 and int8, interleaved.

    python tools/studies/study_cpu_engines.py RUN [RUN ...]

RUN: the folder of a finished run in fp32 with evaluation data, e.g. of recipes/minilm_sts.yaml at 0.5. Both of its
graphs are built in every form below. Each engine is loaded twice in this process, and all instances take turns in the
same blocks, in random order. Points are those of the evaluation data of the run, lost against the unpruned model in
fp32 onnxruntime. Writes docs/measurements/studies/cpu_engines.json (cpu_engines_without_vnni.json on a processor
without such instructions): milliseconds per call by the wall clock and by the CPU time of the process, of every
instance and block. Rows of other runs stay, if they are of the same processor and libraries. Wants a quiet machine;
needs the extra openvino.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from study_files import inputs_of, machine, save, saved_facts, saved_rows

from optin_export import engines, measure
from optin_export.data import Sources, load_sources
from optin_export.engines import Engine
from optin_export.engines.onnxruntime import OnnxRuntimeEngine
from optin_export.environment import sums_of_int8_overflow
from optin_export.export import convert
from optin_export.measure.bootstrap import ratio_of_medians
from optin_export.recipe import MODELS, ExportSection, Target, load_recipe
from optin_export.report.schema import read_report

#: Of a processor with instructions for int8, and of one without.
NAMES = {True: "cpu_engines", False: "cpu_engines_without_vnni"}
#: What all engines are compared with: the unpruned model in fp32, as a run measures it.
AGAINST = ("base", "onnxruntime fp32")
INSTANCES = 2
#: Seconds in which an engine's calls of one block fit, and the least of these calls.
BLOCK_SECONDS, LEAST_CALLS = 0.12, 3
Arrays = Mapping[str, np.ndarray]
Load = Callable[[], Engine]


@dataclass(frozen=True)
class Form:
    """One way to run a graph. section: the precision; None: as a user calls the library, without this package."""

    engine: str
    section: ExportSection | None


def _int8(quantization: str) -> ExportSection:
    return ExportSection.model_validate({"precision": "int8", "quantization": quantization})


FORMS = {
    "onnxruntime fp32": Form("onnxruntime", ExportSection()),
    "onnxruntime defaults": Form("onnxruntime", None),
    "onnxruntime quantize_dynamic": Form("onnxruntime", None),
    "onnxruntime dynamic int8": Form("onnxruntime", _int8("dynamic")),
    "onnxruntime static int8": Form("onnxruntime", _int8("static-u8")),
    "openvino fp32": Form("openvino", ExportSection()),
    "openvino bf16": Form("openvino", ExportSection(precision="bf16")),
    "openvino NNCF int8": Form("openvino", _int8("static")),
}


def prepared(name: str, graph: Path, folder: Path, threads: int, rows: Callable[[], list[Arrays]]) -> Load:
    """Build one form of a graph below `folder`; a function that loads a new instance. rows: the calibration data."""
    form = FORMS[name]
    if form.section is None:
        return _as_users_do(name, graph, folder, threads)
    target, section = Target.model_validate({"engine": form.engine, "threads": threads}), form.section
    which = graph.stem if section.precision == "fp32" else f"{graph.stem}.{section.precision}"
    source = engines.source_of(folder, target, which)
    if source.stem == graph.stem:
        source = graph
    else:
        convert(graph, source, section, rows())
    path = engines.artefact(folder, target, which)
    engines.build(source, target, path)
    return partial(engines.load, path, target)


def _as_users_do(name: str, graph: Path, folder: Path, threads: int) -> Load:
    import onnxruntime
    from onnxruntime.quantization import quantize_dynamic

    path = graph
    if name.endswith("quantize_dynamic"):
        path = folder / f"{graph.stem}.onnx"
        folder.mkdir(parents=True, exist_ok=True)
        quantize_dynamic(str(graph), str(path))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads

    def load() -> Engine:
        return OnnxRuntimeEngine(onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"]))

    return load


def timed(loads: Mapping[str, Load], inputs: Arrays, blocks: int, seed: int = 0) -> dict[str, dict[str, Any]]:
    """Medians per block of each instance's calls: arm -> {"ms": [instances][blocks], "cpu_ms": the same}."""
    generator = np.random.default_rng(seed)
    instances = {(arm, number): load() for number in range(INSTANCES) for arm, load in loads.items()}
    calls = {}
    for key, engine in instances.items():
        ms = measure.latency.warm_up(measure.latency.timer_of(engine, inputs))
        calls[key] = max(LEAST_CALLS, int(BLOCK_SECONDS * 1e3 / ms))
    found = {arm: {clock: [[] for _ in range(INSTANCES)] for clock in ("ms", "cpu_ms")} for arm in loads}
    for _ in range(blocks):
        for index in generator.permutation(len(instances)):
            arm, number = key = list(instances)[index]
            timer, began = measure.latency.timer_of(instances[key], inputs), time.process_time_ns()
            samples = [timer() for _ in range(calls[key])]
            found[arm]["cpu_ms"][number].append((time.process_time_ns() - began) / 1e6 / calls[key])
            found[arm]["ms"][number].append(float(np.median(samples)))
    return found


def speedup(slow: list[list[float]], fast: list[list[float]]) -> dict[str, float]:
    """How many times faster, over both instances, with the interval over blocks."""
    above, below = ([list(block) for block in zip(*arm, strict=True)] for arm in (slow, fast))
    ratio = ratio_of_medians(above, below, np.random.default_rng(0))
    return {"median": ratio.median, "low": ratio.low, "high": ratio.high}


def rows_of(run: Path, sources: Sources, args: argparse.Namespace) -> list[dict[str, Any]]:
    """All forms of one run's two graphs: points once, times at every batch size."""
    report, inputs, data = read_report(run), inputs_of(run), sources.evaluation()
    assert data is not None, f"{run} has no evaluation data"
    rows: list[dict[str, Any]] = []

    def calibration() -> list[Arrays]:
        return [{name: tensor.numpy() for name, tensor in batch.inputs.items()} for batch in sources.quantization]

    with tempfile.TemporaryDirectory(prefix="study-cpu-engines-") as scratch:
        loads: dict[tuple[str, str], Load] = {}
        for model in MODELS:
            for number, name in enumerate(name for name in FORMS if name in args.forms):
                if name == "openvino bf16" and engines.lacks(Target(engine="openvino"), "bf16"):
                    continue
                folder = Path(scratch) / f"{number}"
                loads[model, name] = prepared(name, run / "onnx" / f"{model}.onnx", folder, args.threads, calibration)
        predicted = {}
        for key, load in loads.items():
            engine = load()
            predicted[key] = measure.predict(lambda given, one=engine: one.run(given)[one.outputs[0]], data)
        judged = {key: measure.evaluate(predicted[AGAINST], one, data.metric, 0) for key, one in predicted.items()}
        print(f"{report.name}: timing begins, which wants a quiet machine", flush=True)
        for batch in args.batches:
            some = {name: values[:batch] for name, values in inputs.items()}
            found = timed({" | ".join(key): load for key, load in loads.items()}, some, args.blocks)
            for model, form in loads:
                times, against = found[f"{model} | {form}"], found[" | ".join(AGAINST)]
                accuracy = judged[model, form]
                rows.append(
                    {
                        "run": report.name,
                        "kept": round(report.macs.ratio, 4),
                        "macs": round(report.macs.ratio, 4) if model == "pruned" else 1.0,
                        "model": model,
                        "form": form,
                        "batch": batch,
                        "metric": accuracy.metric,
                        "points": accuracy.pruned,
                        "lost": accuracy.drop,
                        "lost_low": accuracy.drop_low,
                        "lost_high": accuracy.drop_high,
                        "speedup": speedup(against["ms"], times["ms"]),
                        "speedup_cpu": speedup(against["cpu_ms"], times["cpu_ms"]),
                        **times,
                    }
                )
                one = rows[-1]
                print(
                    f"{one['run']} batch {batch}, {model:<6} {form:<28} {one['speedup']['median']:.2f}x, by CPU time "
                    f"{one['speedup_cpu']['median']:.2f}x, lost {one['lost']:+.2f}"
                )
    print(f"{report.name}: timing has ended", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--blocks", type=int, default=24)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--forms", nargs="+", choices=list(FORMS), default=list(FORMS))
    args = parser.parse_args()
    if AGAINST[1] not in args.forms:
        parser.error(f"--forms needs '{AGAINST[1]}', which all are compared with")
    facts: dict[str, Any] = {
        **machine("onnxruntime", "openvino", "nncf"),
        "int8_instructions": not sums_of_int8_overflow(),
    }
    facts |= {"bf16_instructions": not engines.lacks(Target(engine="openvino"), "bf16"), "threads": args.threads}
    name = NAMES[facts["int8_instructions"]]
    if saved_rows(name) and (others := differing(saved_facts(name), facts)):
        parser.error(f"{name}.json is of another machine ({others}): move it away, a table is never of two")
    for run in args.runs:
        rows = rows_of(run, load_sources(load_recipe(run / "recipe.yaml")), args)
        replaced = {_key(row) for row in rows}
        kept = [row for row in saved_rows(name) if _key(row) not in replaced]
        save(name, {**facts, "rows": [*kept, *rows]})


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["run"], row.get("kept"), row["batch"]


def differing(before: dict[str, Any], now: dict[str, Any]) -> str:
    """What differs between the machines of saved rows and of new ones, for a message; "" for nothing."""
    return ", ".join(f"{key} {before.get(key)}, now {value}" for key, value in now.items() if before.get(key) != value)


if __name__ == "__main__":
    main()
