"""Row weights of the least squares: where an error costs, and nothing but where."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import pytest
import torch
from torch import nn

from optin_export.data import Batch
from optin_export.models import TaskModel
from optin_export.repair import sensitivity
from optin_export.repair.sensitivity import Weights, sensitivities
from optin_export.units import find_structure
from tests.units.models import batches_for, small_model


def weights_of(model: TaskModel, batches: list[Batch], seed: int = 0) -> Weights:
    return sensitivities(model, find_structure(model), batches, seed)


def silence(term: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other term alone; as many random numbers are drawn as with both."""
    probe = getattr(sensitivity, term)
    monkeypatch.setattr(sensitivity, term, lambda *args: 0.0 * probe(*args))


@pytest.mark.parametrize("name", ["bert", "bert-embedding", "vit", "resnet-timm", "resnet-cifar", "vgg-bn", "vgg"])
def test_weights_are_finite_with_mean_one(name: str) -> None:
    model, _ = small_model(name)
    structure, batches = find_structure(model), batches_for(model, 2, size=3)
    weights = weights_of(model, batches)
    for group in structure.groups:
        for path in (group.consumer, *(producer.path for producer in group.producers)):
            rows = torch.cat([weights.of(index, [path]) for index in range(2)])  # type: ignore[list-item]
            assert torch.isfinite(rows).all() and (rows >= 0).all()
            assert float(rows.mean()) == pytest.approx(1.0, rel=1e-4)
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    again = weights_of(model, batches)
    assert all(torch.equal(again.values[1][path], rows) for path, rows in weights.values[1].items())


def test_one_batchs_graph_is_gone_before_the_next_ones() -> None:
    """Memory is that of one graph, however many batches there are."""
    model, _ = small_model("bert")
    held: list[weakref.ref[torch.Tensor]] = []

    def look(module: nn.Module, args: Any, output: torch.Tensor) -> None:
        if output.requires_grad:
            assert all(one() is None for one in held)
            held.append(weakref.ref(output))

    with_hook = model.get_submodule("model.classifier").register_forward_hook(look)
    weights_of(model, batches_for(model, 3, size=3))
    with_hook.remove()
    assert len(held) == 3


def test_a_classifiers_last_block_reads_one_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """BERT classifies by its first token: behind the last attention the output depends on no other row."""
    model, _ = small_model("bert")
    batches = batches_for(model, 2, size=4)
    layer = "model.bert.encoder.layer.2"
    both = weights_of(model, batches)
    silence("trajectory_probe", monkeypatch)
    output = weights_of(model, batches)
    for index, batch in enumerate(batches):
        mask = batch.inputs["attention_mask"]
        first = torch.zeros_like(mask).index_fill(1, torch.tensor([0]), 1)[mask.bool()].bool()
        for name in ("output.dense", "intermediate.dense", "attention.output.dense", "attention.self.query"):
            rows = output.values[index][f"{layer}.{name}"]
            assert rows[~first].abs().max() == 0 and (rows[first] > 0).all()
            assert (both.values[index][f"{layer}.{name}"][~first] > 0).all()  # their relations count as well
        for name in ("attention.self.key", "attention.self.value"):  # what the first token attends to
            assert (output.values[index][f"{layer}.{name}"] > 0).all()


@pytest.mark.parametrize("name", ["bert", "resnet-torchvision"])
def test_both_terms_count_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = small_model(name)
    batches = batches_for(model, 2, size=4)
    both, alone = weights_of(model, batches), []
    for term in ("trajectory_probe", "output_probe"):
        with monkeypatch.context() as context:
            silence(term, context)
            alone.append(weights_of(model, batches))
    for index in range(2):
        for path, rows in both.values[index].items():
            mean = (alone[0].values[index][path] + alone[1].values[index][path]) / 2
            torch.testing.assert_close(rows, mean, rtol=1e-4, atol=1e-6)
    # A layer that a term does not reach has the other term's weights.
    assert all(path in alone[0].values[0] and path in alone[1].values[0] for path in both.values[0])


def test_samples_count_alike() -> None:
    """A sample of which the model is certain has as much weight as one of which it is not; its rows may differ."""
    model, _ = small_model("bert")
    batch = batches_for(model, 1, size=4)[0]
    lengths = batch.inputs["attention_mask"].sum(1).tolist()
    for rows in weights_of(model, [batch]).values[0].values():
        sums = torch.stack([part.sum() for part in rows.split(lengths)])
        torch.testing.assert_close(sums, sums.mean().expand(4), rtol=1e-4, atol=0)
    model, _ = small_model("vgg")
    rows = weights_of(model, batches_for(model, 1, size=4)).values[0]["model.classifier.0"]
    torch.testing.assert_close(rows, torch.ones(4))


def test_a_row_that_a_norm_is_about_to_shrink_counts_little() -> None:
    """A token with a massive activation: an error of the same size changes its normalised row much less."""
    model, _ = small_model("vit")
    model.model.pos_embed.data[:, 5] *= 300.0  # type: ignore[union-attr, index, operator]
    weights = weights_of(model, batches_for(model, 1, size=4))
    for name in ("blocks.0.mlp.fc2", "blocks.1.mlp.fc2"):
        rows = weights.values[0][f"model.{name}"].view(4, -1)
        assert rows[:, 5].max() < 0.05 < rows.mean()


def test_an_activation_in_place_changes_nothing() -> None:
    """Without a norm between, a ReLU in place writes over the very output whose gradient is asked for."""
    model, _ = small_model("vgg")
    separate = copy.deepcopy(model)
    for module in separate.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    batches = batches_for(model, 1, size=3)
    first, second = weights_of(model, batches), weights_of(separate, batches)
    assert first.values[0].keys() == second.values[0].keys()
    for path, rows in first.values[0].items():
        torch.testing.assert_close(rows, second.values[0][path])


def test_weights_of_layers_refitted_at_once_are_their_mean() -> None:
    values: list[dict[str, Any]] = [{"query": torch.tensor([1.0, 3.0]), "key": torch.tensor([3.0, 1.0])}]
    weights = Weights(values)
    assert torch.equal(weights.of(0, ["query", "key"]), torch.tensor([2.0, 2.0]))  # type: ignore[arg-type]
    assert torch.equal(weights.of(0, ["query", "other"]), torch.tensor([1.0, 3.0]))  # type: ignore[arg-type]
    assert weights.of(0, ["other"]) is None
