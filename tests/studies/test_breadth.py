"""tools/studies/breadth.py: how a row is made, what its check sees, and its page; no architecture is run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.test_docs import load_tool

build, checks, runs, page, study = (
    load_tool(name) for name in ("breadth_build", "breadth_check", "breadth_run", "render_breadth", "breadth")
)


def test_every_architecture_has_a_name_and_a_task_of_its_modality() -> None:
    assert len(study.CASES) >= 160
    assert {case.modality for case in study.CASES.values()} == {"text", "image", "audio"}
    assert {case.library for case in study.CASES.values()} == set(page.TITLES)
    assert all(case.modality != "image" or case.size > 0 for case in study.CASES.values())
    parts = (load_tool(name).CASES for name in ("breadth_text", "breadth_images", "breadth_python"))
    assert len(study.CASES) == sum(map(len, parts)), "two architectures have the same name"


@pytest.mark.parametrize("name", ["bert-embedding", "vit-timm", "own-unet", "own-lstm"])
def test_a_built_model_is_loaded_again_by_its_library(name: str, tmp_path: Path) -> None:
    case = study.CASES[name]
    made = case.make(tmp_path / "model")
    first, again = checks.original(case, made), checks.original(case, made)
    label, given = next(iter(checks.inputs(case, made)))
    with torch.no_grad():
        given = {key: value for key, value in given.items() if key != "token_type_ids"}
        output = first(given)
        assert torch.equal(output, again(given)) and output.shape[0] == 1 and output.std() > 0, label


def test_enliven_reaches_layers_that_begin_at_zero() -> None:
    layers = [torch.nn.Linear(8, 8), torch.nn.BatchNorm1d(8), torch.nn.Embedding(4, 8)]
    model = torch.nn.Sequential(*layers)
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    model.register_parameter("scale", torch.nn.Parameter(torch.full((8,), 1e-5)))
    build.enliven(model)
    assert all(parameter.abs().max() > 0.05 for parameter in model.parameters())
    assert not model.training and layers[1].running_mean.abs().max() > 0
    assert (model.scale >= 0.5).all()


def test_texts_and_tokenizer_agree() -> None:
    texts, tokenizer = build.sentences(20), build.tokenizer()
    ids = [tokenizer(text)["input_ids"] for text in texts]
    assert len(build.words()) == build.VOCABULARY == len(tokenizer)
    assert all(one[0] == 2 and one[-1] == 3 and 1 not in one and max(one) < build.VOCABULARY for one in ids)


def test_padding_grows_with_the_row_and_leaves_two_tokens() -> None:
    given = checks.padded(5, 7, torch.Generator().manual_seed(0))
    assert given["attention_mask"].sum(1).tolist() == [7, 4, 2, 2, 2]
    assert (given["input_ids"] > 0).long().equal(given["attention_mask"])
    assert (given["input_ids"] == checks.END).sum(1).tolist() == [1] * 5
    assert given["input_ids"][[0, 1, 4], [6, 3, 1]].tolist() == [checks.END] * 3  # the last tokens


def test_a_difference_is_relative_and_skips_padding() -> None:
    reference, mask = np.ones((2, 3, 4)), np.array([[1, 1, 1], [1, 1, 0]])
    output = reference.copy()
    output[1, 2] = 9.0
    assert checks.difference(output, reference, mask) == 0.0
    assert checks.difference(output, reference) == 8.0
    output[1, 1, 0] = 1.5
    assert checks.difference(output, 4 * reference, mask) == 3 / 4
    spans = np.zeros((2, 2, 3))
    spans[1, 0, 2] = -1e4
    assert checks.difference(spans, np.zeros((2, 2, 3)), mask) == 0.0
    assert checks.difference(reference, reference[:1]) == float("inf")
    assert checks.difference(np.full((1, 2), np.nan), np.ones((1, 2))) == float("inf")


def test_a_model_that_rounds_is_compared_with_itself_in_float64() -> None:
    def rounds(given: dict[str, torch.Tensor]) -> torch.Tensor:
        return given["x"] + 1e6 - 1e6

    def narrow(given: dict[str, torch.Tensor]) -> torch.Tensor:
        raise RuntimeError("expected scalar type Float but found Double")

    given = {"x": torch.full((2, 3), 0.01), "ids": torch.ones(2, dtype=torch.long)}
    assert checks.rounding(rounds, lambda: rounds, given) == pytest.approx(1.0)  # 1e6 has steps of 1/16
    assert checks.rounding(rounds, lambda: narrow, given) == 0.0


def test_a_refusal_has_three_lines_and_a_crash_its_last_line() -> None:
    refused = json.dumps({"error": {"what": "no", "why": "it is new", "fix": "wait", "exit_code": 2}})
    assert runs.ending(2, f"{refused}\n", "") == {"reason": "no: it is new", "one_sentence": True}
    assert runs.ending(2, "", "") == {"reason": None, "one_sentence": False}
    trace = (
        "Traceback (most recent call last):\n  File x\nValueError: odd\nerror: this is a bug in optin_export; please"
    )
    assert runs.ending(1, "", trace) == {"reason": "ValueError: odd", "one_sentence": False}
    assert runs.ending(0, "{}", "") == {"reason": None, "one_sentence": True}


def test_a_plan_is_counted_by_kind() -> None:
    groups = {
        "block00.heads": {"count": 4, "kept": [0, 1]},
        "block01.heads": {"count": 4, "kept": [0, 1, 2, 3]},
        "block01.neurons2": {"count": 16, "kept": list(range(8))},
    }
    assert runs.planned(groups) == {"heads": [8, 2], "neurons": [16, 8]}


def test_rows_that_exist_are_not_repeated_unless_they_are_named() -> None:
    first, second = list(study.CASES)[:2]
    rows = {first: {"code": 0, "quick": True}, second: {"code": 0, "quick": False}}
    assert study.wanted([], rows, True)[:1] == list(study.CASES)[2:3]
    assert study.wanted([], rows | {first: {"unbuilt": "ImportError"}}, True)[0] == first
    assert study.wanted([], rows, False)[:2] == [first, list(study.CASES)[2]]
    assert study.wanted([second], rows, False) == [second]
    with pytest.raises(SystemExit, match="no such architecture: unknown"):
        study.wanted(["unknown"], rows, True)


def row(code: int | None, **more: Any) -> dict[str, Any]:
    common = {"library": "timm", "task": "image-classification", "attention": True, "one_sentence": True}
    return {**common, "code": code, "reason": None, "seconds": 2.0, **more}


ROWS = {
    "good": row(
        0,
        units={"heads": [12, 5], "neurons": [384, 64]},
        macs=0.61,
        check={"base": 1e-6, "pruned": 0.0, "masked": 2e-7, "failed": []},
    ),
    "wrong": row(0, units={"neurons": [384, 64]}, macs=0.7, floor=0.4, check={"failed": ["base differs by 3.0e-01"]}),
    "new": row(2, reason="the architecture NewModel is not supported: no family; nearest: bert"),
    "other": row(2, reason="the architecture OtherModel is not supported: no family; nearest: vit", attention=False),
    "broken": row(1, reason="KeyError: 'x'", one_sentence=False),
    "slow": row(None, reason="more than 300 s", one_sentence=False),
    "absent": {**row(None), "unbuilt": "ImportError: no such class"},
}


def test_the_time_of_the_measurement_is_told_with_the_load_of_the_machine() -> None:
    row = {"parameters": 109_485_316, "units": {"heads": 144, "neurons": 36864}, "load": [8.6, 9.1]}
    row |= {"found": {"cpu": 12.3, "clock": 99.0}, "verified": {"cpu": 40.0, "clock": 200.4}}
    machine = {"cpu": "A CPU", "packages": {"torch": "2"}}
    content = {"tokens": 128, "cores": 2, "environment": machine, "rows": {"BERT-base": row}}
    text = page.page({"budget": 0.6, "environment": machine, "rows": ROWS}, content)
    assert "| BERT-base | 109 M | 144 heads, 36864 neurons | 12 (99) | 40 (200) |" in text
    assert "a load of 8.6 to 9.1 on 2 cores" in text
    row["load"] = [0.9, 1.0]
    assert "The machine had no other work." in "\n".join(page.seconds(content))


def test_the_page_counts_what_ran() -> None:
    machine = {"cpu": "A CPU", "packages": {"torch": "2"}}
    text = page.page({"budget": 0.6, "environment": machine, "rows": ROWS})
    for line in (
        "Measured: 7 architectures of those",
        "| exit code 0 | 2 of 6 (33%) |",
        "| models with attention whose heads are units | 1 of 5 (20%) |",
        "| exit code 1 | 1 |",
        "| killed at the time limit | 1 |",
        "| refusals that are no single sentence | 0 |",
        "| exit code 0, but a difference above the tolerance | 1 |",
        "| the architecture X is not supported: no family | 2 | new, other |",
        "| `good` | image-classification | 0 | 5 of 12 heads, 64 of 384 neurons | 0.61 | 1e-06 | 0 | 2e-07 | 2 |  |",
    ):
        assert line in text
    assert "| 0.70 (floor 0.40) | - | - | - | 2 | base differs by 3.0e-01 |" in text
    assert "its library cannot build it: ImportError" in text


def test_reasons_of_two_architectures_are_one_without_their_names() -> None:
    first = page.general("no plan meets the budget macs: 0.6: with the minimum the model still has 0.8123; more")
    assert first == page.general("no plan meets the budget macs: 0.6: with the minimum the model still has 0.9")
    assert page.general("layer 'a.b' of BertLayer is odd") == "layer X of X is odd"
    named = [
        page.general(f"the architecture {name} is not supported: no family; nearest: x") for name in ("Xcit", "FNetV2")
    ]
    assert named == ["the architecture X is not supported: no family"] * 2
    listed = "task: should be 'a', 'b' or 'c', not 'd' (did you mean 'a'?)"
    assert page.general(listed) == "task: should be X, not X"
