"""`optin_export.prune` gives what the command line gives on the same model, rows and seed, to the last bit."""

from __future__ import annotations

import copy
import csv
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import optin_export as oe
from optin_export.models.loading import call_python
from optin_export.search import read_plan
from tests.conftest import ROOT, VIT_ARGS, enlarge

Make = Callable[..., dict[str, Any]]
#: Fields that make it quick; without them `prune` takes the recipe's defaults.
QUICK: dict[str, Any] = {"probes": 8, "rows": 64, "score_samples": 16, "curve_samples": 16}
VIT = {"source": "timm:vit_tiny_patch16_224", "args": VIT_ARGS}


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(40, 1, 32, 32, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def vit(vit_checkpoint: Path) -> nn.Module:
    import timm
    from safetensors.torch import load_file

    model: nn.Module = timm.create_model("vit_tiny_patch16_224", pretrained=False, **VIT_ARGS)
    model.load_state_dict(load_file(vit_checkpoint))
    return model


@pytest.fixture
def texts(text_data: Path) -> list[str]:
    with (text_data / "classes.tsv").open(encoding="utf-8") as file:
        return [row["sentence"] for row in csv.DictReader(file, delimiter="\t")]


@pytest.fixture
def bert(bert_folder: Path) -> tuple[nn.Module, Any]:
    import transformers

    model = transformers.AutoModelForSequenceClassification.from_pretrained(bert_folder)
    return model, transformers.AutoTokenizer.from_pretrained(bert_folder)


def same(first: nn.Module, second: nn.Module) -> bool:
    ours, theirs = first.state_dict(), second.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


# --- what the command line gives ------------------------------------------------------------------------------------


def test_a_vit_is_pruned_as_by_a_recipe_of_defaults(
    vit: nn.Module, images: torch.Tensor, vit_recipe: Make, tmp_path: Path
) -> None:
    np.savez(tmp_path / "rows.npz", image=images.numpy())
    data = {"calibration": {"source": f"npz:{tmp_path / 'rows.npz'}"}}
    sections = {"data": data, "prune": {"budget": {"macs": 0.6}}, "tokens": {}}
    oe.run(vit_recipe(**sections), tmp_path / "run", stop_after="surgery")

    labels = torch.zeros(len(images))
    small = oe.prune(vit, DataLoader(TensorDataset(images, labels), batch_size=16), macs=0.6)

    assert small.plan == read_plan(tmp_path / "run" / "plan" / "plan.json")
    assert same(small.model, oe.load_model(tmp_path / "run" / "model").model)
    folder = small.save(tmp_path / "saved", **VIT)
    for name in ("architecture.json", "model.safetensors"):
        assert (folder / name).read_bytes() == (tmp_path / "run" / "model" / name).read_bytes()


def test_a_bert_is_pruned_as_by_a_recipe_of_defaults(
    bert: tuple[nn.Module, Any], texts: list[str], classifier_recipe: Make, text_data: Path, tmp_path: Path
) -> None:
    """Its 64 positions are fewer than the 128 tokens that a recipe has by default."""
    source = {"source": f"tsv:{text_data / 'classes.tsv'}", "columns": {"text": "sentence"}}
    sections: dict[str, Any] = {"prune": {"budget": {"params": 0.8}}, "export": {"sequence": 64}, "seed": 5}
    recipe = classifier_recipe(data={"calibration": source}, **sections)
    oe.run(recipe, tmp_path / "run", stop_after="surgery")
    model, tokenizer = bert

    small = oe.prune(model, texts, tokenizer=tokenizer, params=0.8, seed=5)

    assert small.plan == read_plan(tmp_path / "run" / "plan" / "plan.json")
    assert same(small.model, oe.load_model(tmp_path / "run" / "model").model)
    assert type(small.model) is type(model)
    small.save(tmp_path / "saved")
    for name in ("architecture.json", "model.safetensors"):
        assert (tmp_path / "saved" / name).read_bytes() == (tmp_path / "run" / "model" / name).read_bytes()


def test_tokens_give_what_their_texts_give(bert: tuple[nn.Module, Any], texts: list[str]) -> None:
    """However a batch is padded, and with labels that nobody asked for."""
    model, tokenizer = bert
    by_text = oe.prune(model, texts[:32], tokenizer=tokenizer, macs=0.7, sequence=16, **QUICK)
    batches = [
        dict(tokenizer(texts[at : at + 8], padding="max_length", max_length=16 + at, return_tensors="pt"), labels=at)
        for at in range(0, 32, 8)
    ]
    by_tokens = oe.prune(model, batches, macs=0.7, sequence=16, **QUICK)
    assert by_tokens.plan == by_text.plan and same(by_tokens.model, by_text.model)


def test_the_exported_file_computes_what_the_model_does(vit: nn.Module, images: torch.Tensor, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    small = oe.prune(vit, images, macs=0.5, **QUICK)
    facts = small.to_onnx(tmp_path / "small.onnx", batch=5)
    session = runtime.InferenceSession(tmp_path / "small.onnx", providers=["CPUExecutionProvider"])
    assert facts.inputs == ("pixel_values",)
    for rows in (1, 5):
        (got,) = session.run(None, {"pixel_values": images[:rows].numpy()})
        with torch.no_grad():
            np.testing.assert_allclose(got, small.model(images[:rows]).numpy(), atol=1e-4)


# --- the caller's own -----------------------------------------------------------------------------------------------


def test_the_model_and_the_state_of_torch_stay_as_they_are(vit: nn.Module, images: torch.Tensor) -> None:
    vit.train()
    vit.blocks[0].eval()
    vit.head.requires_grad_(False)
    before = copy.deepcopy(vit)
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    with torch.no_grad():  # the sensitivities of the repair need gradients all the same
        small = oe.prune(vit, images, macs=0.6, **QUICK)
    assert torch.equal(torch.rand(3), expected)
    assert same(vit, before)
    flags = [(part.training, [weight.requires_grad for weight in part.parameters()]) for part in vit.modules()]
    assert flags == [
        (part.training, [weight.requires_grad for weight in part.parameters()]) for part in before.modules()
    ]
    assert not any(part.training for part in small.model.modules())
    assert all(weight.grad is None for weight in vit.parameters())


def test_the_pruned_model_can_be_trained_and_saved_as_it_is_then(
    vit: nn.Module, images: torch.Tensor, tmp_path: Path
) -> None:
    small = oe.prune(vit, images, macs=0.6, **QUICK)
    optimizer = torch.optim.SGD(small.model.parameters(), lr=1e-3)
    assert all(weight.requires_grad for weight in small.model.parameters())
    losses = []
    for _ in range(3):
        loss = nn.functional.mse_loss(small.model.train()(images[:8]), vit.eval()(images[:8]).detach())
        optimizer.zero_grad()
        loss.backward()
        assert all(weight.grad is not None for weight in small.model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    again = oe.load_model(small.save(tmp_path, **VIT))
    assert small.model.training and same(again.model, small.model)


def test_accuracy_is_a_budget_where_labelled_rows_are_given(vit: nn.Module, images: torch.Tensor) -> None:
    with torch.no_grad():
        labels = vit.eval()(images).argmax(1)  # what the model says: it is right on all of them
    rows = TensorDataset(images, labels)
    small = oe.prune(vit, images, accuracy_drop=50, evaluation=rows, **QUICK)
    accuracy = small.report["accuracy"]
    assert accuracy["base"] == 100 and accuracy["rows"] == len(images) // 2
    with torch.no_grad():
        order = np.random.default_rng(0).permutation(len(images))
        judged = np.sort(order[len(images) // 2 :])
        right = (small.model(images[judged]).argmax(1) == labels[judged]).float().mean()
    assert accuracy["pruned"] == pytest.approx(100 * float(right))
    assert small.report["macs"]["ratio"] < 1 and small.report["score"]["tried"]


def test_tokens_can_be_merged(vit: nn.Module, images: torch.Tensor, tmp_path: Path) -> None:
    small = oe.prune(vit, images, macs=0.6, tokens=[4, 4], **QUICK)
    assert small.plan.merged == (4, 4)
    again = oe.load_model(small.save(tmp_path, **VIT))
    with torch.no_grad():
        torch.testing.assert_close(again(images[:3]), small.model(images[:3]))


# --- what is shown --------------------------------------------------------------------------------------------------


def test_the_report_and_the_tables_say_what_is_left(vit: nn.Module, images: torch.Tensor) -> None:
    small = oe.prune(vit, images, macs=0.6, units=["neurons"], repair=False, **QUICK)
    assert list(small.report) == ["macs", "params", "groups", "score", "repair", "notes"]
    assert small.report["params"]["pruned"] == sum(weight.numel() for weight in small.model.parameters())
    assert small.report["macs"]["pruned"] == small.plan.predicted.macs and small.report["repair"]["repairs"] == {}
    group = small.report["groups"]["block01.neurons"]
    kept = small.model.blocks[1].mlp.fc1.out_features  # type: ignore[index, union-attr]
    assert group == {"block": "blocks.1", "kind": "neurons", "count": 128, "kept": kept}
    headline, names, *rows = repr(small).splitlines()
    assert re.fullmatch(
        r"VisionTransformer with \d+\.\d% of the MACs and \d+\.\d% of the parameters", headline
    ) and names.split() == ["block", "neurons"]
    assert rows[1].split() == ["blocks.1", f"{kept}/128"]
    assert f"<td>{kept}/128</td>" in small._repr_html_() and "<th>neurons</th>" in small._repr_html_()


def test_the_public_names_are_those_that_are_shown() -> None:
    assert dir(oe) == ["Pruned", "Report", "__version__", "errors", "load_model", "prune", "run"]
    assert all(hasattr(oe, name) for name in dir(oe))
    assert oe.prune.__module__ == "optin_export.api" and issubclass(oe.errors.InputError, oe.errors.OptinError)
    with pytest.raises(AttributeError, match="no attribute 'prunes'"):
        oe.prunes  # noqa: B018


def test_the_package_is_imported_without_torch() -> None:
    code = "import sys, optin_export as oe; dir(oe); oe.errors.InputError; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


# --- saving a model of an own class ---------------------------------------------------------------------------------


RESNET = f"py:{ROOT / 'recipes' / 'cifar_resnet' / 'resnet.py'}:resnet"


def test_a_plain_module_is_saved_with_the_function_that_builds_it(tmp_path: Path) -> None:
    model = enlarge(call_python(RESNET, {"depth": 8, "classes": 4}))
    rows = torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    small = oe.prune(model, list(rows), macs=0.5, **QUICK)
    assert small.report["macs"]["ratio"] <= 0.5 and small.report["repair"]["repairs"]["output"]
    with pytest.raises(oe.errors.InputError, match="nothing says how"):
        small.save(tmp_path / "none")
    with pytest.raises(oe.errors.InputError, match="could not be built again"):
        small.save(tmp_path / "none", source=RESNET, args={"depth": 14, "classes": 4})
    assert not (tmp_path / "none").exists()
    again = oe.load_model(small.save(tmp_path / "saved", source=RESNET, args={"depth": 8, "classes": 4}), True)
    with torch.no_grad():
        assert torch.equal(again(rows), small.model(rows))


def test_a_model_that_its_library_builds_otherwise_is_not_saved(
    vit: nn.Module, images: torch.Tensor, tmp_path: Path
) -> None:
    """The same names and shapes of weights, and another activation."""
    for block in vit.blocks:  # type: ignore[union-attr]
        block.mlp.act = nn.ReLU()
    small = oe.prune(vit, images, macs=0.6, **QUICK)
    with pytest.raises(oe.errors.InputError, match="its outputs differ"):
        small.save(tmp_path / "saved", **VIT)
    assert not (tmp_path / "saved").exists()


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"macs": 0.5, "units": ["head"]}, "prune.units.0: should be 'heads', 'neurons', 'channels' or 'dimensions'"),
        ({"macs": 0.5, "units": ["channels"]}, "the model has no channels"),
        ({}, "exactly one of: macs, params"),
        ({"macs": 1.5}, "prune.budget.macs"),
        ({"speedup": 2}, "latency is that of an engine"),
        ({"latency_ms": 2}, "latency is that of an engine"),
        ({"macs": 0.5, "probs": 3}, r"unknown field \(did you mean 'probes'"),
        ({"macs": 0.5, "compensate": False}, "set repair"),
        ({"macs": 0.5, "task": "image-classify"}, "model.task: should be"),
        ({"macs": 0.0001}, "no plan meets the budget"),
        ({"accuracy_drop": 1}, "needs data.evaluation"),
        ({"macs": 0.5, "evaluation": torch.zeros(4, 1, 32, 32)}, "item 0 of the evaluation data has no label"),
        ({"macs": 0.5, "evaluation": [(torch.zeros(2, 1, 32, 32), [0, 7])]}, "row 1"),
    ],
)
def test_options_that_do_not_serve_are_refused(
    vit: nn.Module, images: torch.Tensor, options: dict[str, Any], says: str
) -> None:
    with pytest.raises(oe.errors.InputError) as caught:
        oe.prune(vit, images, **options)
    assert caught.match(says) and caught.value.fix


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ([], "the data is empty"),
        (torch.zeros(4, 3, 32, 32), "does not run on the calibration data"),
        ([torch.zeros(2, 1, 32, 32), torch.zeros(2, 1, 16, 16)], r"row 0 is \[1, 32, 32\], row 2 is \[1, 16, 16\]"),
        (torch.full((4, 1, 32, 32), float("nan")), "row 0 is empty, NaN or infinite"),
        (torch.zeros(4, 1, 32, 32, dtype=torch.uint8), r"it is uint8 \[4, 1, 32, 32\]"),
        (["a text"], "give tensors"),
        (7, "it is a int"),
    ],
)
def test_data_that_does_not_serve_is_refused(vit: nn.Module, data: Any, says: str) -> None:
    with pytest.raises(oe.errors.InputError, match=says):
        oe.prune(vit, data, macs=0.5)


def test_texts_need_their_tokenizer(bert: tuple[nn.Module, Any], texts: list[str]) -> None:
    model, tokenizer = bert
    with pytest.raises(oe.errors.InputError, match="set tokenizer="):
        oe.prune(model, texts, macs=0.5)
    with pytest.raises(oe.errors.InputError, match="one is 99999"):
        oe.prune(model, [{"input_ids": torch.full((2, 4), 99999)}], macs=0.5)
    with pytest.raises(oe.errors.InputError, match="the longest row has 12 tokens"):
        oe.prune(model, tokenizer(texts[:8]), macs=0.5, sequence=4)


def test_what_is_no_module_or_has_no_weights_is_refused(images: torch.Tensor) -> None:
    with pytest.raises(oe.errors.InputError, match="it is a str"):
        oe.prune("timm:vit", images, macs=0.5)  # type: ignore[arg-type]
    with torch.device("meta"):
        model = nn.Conv2d(1, 1, 3)
    with pytest.raises(oe.errors.InputError, match="the weights of the model are missing"):
        oe.prune(model, images, macs=0.5)
