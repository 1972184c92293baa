"""The engines' section: the fastest that keeps the accuracy is named, and goals are met or missed by a number."""

from __future__ import annotations

from typing import Any

from tests.test_docs import load_tool

render = load_tool("render_cpu_engines")


def row(model: str, form: str, batch: int, times: float, lost: float) -> dict[str, Any]:
    speedup = {"median": times, "low": times - 0.1, "high": times + 0.1}
    points = {"lost": lost, "lost_low": lost - 0.5, "lost_high": lost + 0.5}
    macs = 1.0 if model == "base" else 0.5
    place = {"run": "minilm-sts", "model": model, "form": form, "batch": batch, "macs": macs}
    return {**place, **points, "speedup": speedup, "speedup_cpu": speedup}


ROWS = [
    row(model, form, batch, times * batch**0.5, lost)
    for batch in (1, 16)
    for model, form, times, lost in (
        ("base", "onnxruntime fp32", 1.0, 0.0),
        ("base", "openvino NNCF int8", 2.5, 0.2),
        ("pruned", "onnxruntime fp32", 1.9, 0.1),
        ("pruned", "openvino NNCF int8", 5.5, 0.9),
        ("pruned", "onnxruntime static int8", 7.0, 1.4),
    )
]
CONTENT = {"cpu": "A CPU", "int8_instructions": False, "onnxruntime": "1.0", "openvino": "2.0", "rows": ROWS}


def test_the_section_says_what_is_fastest_and_which_goals_are_met() -> None:
    lines = render.sections(CONTENT)
    assert "### minilm-sts, 50% of the MACs" in lines
    assert "| unpruned | onnxruntime fp32 | - | 1.00x (0.90 to 1.10) [1.00] | 4.00x (3.90 to 4.10) [4.00] |" in lines
    assert (
        "- Batch 1, at most 1 point lost: unpruned 2.50x (openvino NNCF int8, 0.20 lost), "
        "pruned 5.50x (openvino NNCF int8, 0.90 lost). Goal 5x: met." in lines
    )
    few = [one | {"speedup": {**one["speedup"], "median": one["speedup"]["median"] / 10}} for one in ROWS]
    assert any(line.endswith("Goal 5x: missed by 4.45.") for line in render.sections({**CONTENT, "rows": few}))


def test_where_every_form_loses_more_the_one_that_loses_least_is_named() -> None:
    rows = [row("pruned", "a", 1, 9.0, 3.0), row("pruned", "b", 1, 2.0, 1.5)]
    assert render.best(rows, 1, "pruned")["form"] == "b"


def test_the_plot_has_every_form_of_both_batches() -> None:
    ((name, drawn),) = render.figures(CONTENT).items()
    assert name == "cpu-engines-minilm-sts-50.svg" and drawn.count("ort static int8") == 2 and "batch 16" in drawn
