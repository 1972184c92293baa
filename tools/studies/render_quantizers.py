"""The section of docs/results.md on graphs for TensorRT by this package and by ModelOpt, from study_quantizers.py."""

from __future__ import annotations

from typing import Any

from plots import section

CASES = ("quickstart", "minilm_sts", "deit_tiny")
_ORDER = ("fp32", "int8", "int8 without attention", "int8 entropy", "int8 dynamic", "fp8", "fp16", "bf16")
#: What was decided by the table.
CONCLUSION = """So recipes have no ModelOpt. In int8 it also quantises the products of attention; it lost
clearly more on `deit_tiny`, and as much within the intervals on the others. Without them (`disable_mha_qdq`) it
loses there what ours loses. In fp8 both are equal within the intervals where both were measured; in 16 bits
AutoCast has fewer casts because it converts softmax and norms too, which ours keeps in fp32: they can overflow.
ModelOpt 0.47 needs onnx 1.21 and onnxruntime-gpu 1.24, and changes onnxruntime's own quantisation tools in its
process, so it would need an environment of its own. Whether int8 in attention is faster on a GPU is not known:
nobody has timed these graphs. To try it, quantise `onnx/pruned.onnx` of a run with `python -m
modelopt.onnx.quantization`."""


def quantizers(content: dict[str, Any]) -> list[str]:
    rows = []
    # What is compared stands together.
    found = {case: [row for row in content["rows"] if row["case"] == case] for case in CASES}
    for one in (row for case in CASES for row in sorted(found[case], key=lambda row: _ORDER.index(row["precision"]))):
        if one["by"] == "-":
            continue
        if "not_made" in one:
            rows.append([f"`{one['case']}`", one["precision"], one["by"], one["not_made"], "-", "-", "-", "-"])
            continue
        products = [f"{one[f'{kind}_few_bits']} of {one[kind]}" for kind in ("weighted", "attention")]
        rows.append(
            [f"`{one['case']}`", one["precision"], one["by"], _lost(one), *products, str(one["nodes"]), _built(one)]
        )
    versions = [f"{name} {number}" for name, number in content["versions"].items()]
    ours = ", ".join(f"{name} {number}" for name, number in content["ours"].items())
    prose = [
        "Graphs of unpruned models for TensorRT, made from the same fp32 export and the same 128 calibration rows by",
        f"this package (with {ours}) and by NVIDIA's ModelOpt (`tools/studies/study_quantizers.py`).",
        "Points lost (95 % interval) against fp32, by onnxruntime on the CPU without its optimisations, on the same",
        "rows; products with weights and of two activations (attention) whose inputs, or in 16 bits whose output,",
        "have few bits; nodes of the graph; and whether TensorRT for RTX builds an engine (compute capability 8.9; not",
        "run).",
        f"{content['cpu']}, {', '.join(versions)}.",
    ]
    columns = ["case", "precision", "by", "points lost", "with weights", "in attention", "nodes", "RTX builds"]
    return [*section("Graphs for TensorRT: ours or ModelOpt", prose, columns, rows), "", *CONCLUSION.splitlines()]


def _lost(one: dict[str, Any]) -> str:
    if "refused" in one:
        return "onnxruntime cannot run it"
    return f"{one['drop']:z.2f} ({one['drop_low']:z.2f} to {one['drop_high']:z.2f})"


def _built(one: dict[str, Any]) -> str:
    if "rtx" in one:
        return f"no: {one['rtx']}"
    return "yes" if "rtx_bytes" in one else "-"
