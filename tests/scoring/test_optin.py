"""OPTIN's score: the sketch estimates what exact masking measures; padding and single huge units do not fool it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from optin_export.data import Batch, Sources, load_sources
from optin_export.errors import InputError
from optin_export.models import Placement, TaskModel
from optin_export.objective import divergence, observe, relation
from optin_export.progress import reporting
from optin_export.recipe import Budget, PruneSection, validate
from optin_export.scoring import Request, in_process, optin, score, sketch
from optin_export.scoring.optin import observe_all, optin_scores
from optin_export.units import Structure, find_structure, get_layer
from tests.conftest import Make
from tests.scoring.masking import exact_losses
from tests.units.models import batches_for, inputs_for, small_model

Result = tuple[dict[str, np.ndarray], dict[str, float]]


@pytest.fixture
def sources(bert_recipe: Make, tmp_path: Path) -> Sources:
    return load_sources(validate(bert_recipe(), tmp_path))


@pytest.fixture
def classifier(classifier_recipe: Make, tmp_path: Path) -> Sources:
    return load_sources(validate(classifier_recipe(), tmp_path))


def config(probes: int | str = 12, rows: int = 256, **settings: Any) -> PruneSection:
    return PruneSection(budget=Budget(macs=0.5), probes=probes, rows=rows, **settings)  # type: ignore[arg-type]


def run(sources: Sources, probes: int | str = 12, seed: int = 0, batches: tuple[Batch, ...] | None = None) -> Result:
    structure = find_structure(sources.model)
    return scores_of(sources.model, structure, batches or sources.scoring, config(probes), seed)


def scores_of(model: TaskModel, structure: Structure, batches: Any, settings: PruneSection, seed: int = 0) -> Result:
    return optin_scores(Request(model, structure, batches, settings, seed, in_process, Placement()))


def sketched(structure: Structure, values: dict[str, np.ndarray]) -> np.ndarray:
    """The scores of everything but heads, one after another."""
    return np.concatenate([values[group.key] for group in structure.groups if group.kind != "heads"])


@pytest.mark.parametrize("kind", ["sources", "classifier"])
def test_the_sketch_ranks_neurons_as_exact_masking_does(
    kind: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64, where the exact loss of one neuron is not lost in rounding; nothing is masked exactly beside it."""
    monkeypatch.setattr(optin, "SUSPECTS", 0)
    loaded: Sources = request.getfixturevalue(kind)
    model, structure = loaded.model.double(), find_structure(loaded.model)
    scores, info = run(loaded, probes=128)
    references = observe_all(model, structure, loaded.scoring, 256, torch.Generator().manual_seed(0))
    for group in structure.groups:
        if group.kind == "neurons":
            trajectory, output = exact_losses(model, structure, group, references, 1.0)
            exact = trajectory + info["lambda"] * output
            assert spearmanr(exact, scores[group.key]).statistic > 0.9
            # Not only the order: both are the same quantity.
            assert 0.6 < scores[group.key].sum() / exact.sum() < 1.7


@pytest.mark.parametrize("name", ["resnet-timm", "vgg-bn"])
def test_the_sketch_ranks_channels_as_exact_masking_does(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A channel is a larger step than a neuron: the order is what second order still tells."""
    monkeypatch.setattr(optin, "SUSPECTS", 0)
    model, _ = small_model(name)
    structure, batches = find_structure(model), batches_for(model, 2)
    estimated, _ = scores_of(model, structure, batches, config(64))
    exact = score(model, structure, batches, config(score="optin-exact"), seed=0).values
    assert spearmanr(sketched(structure, exact), sketched(structure, estimated)).statistic > 0.9


def test_a_masked_head_is_a_pass_without_its_columns(sources: Sources) -> None:
    """A head's score is the loss of a plain forward pass with the head's columns of the projection zeroed."""
    model, structure = sources.model, find_structure(sources.model)
    group = structure.groups[2]  # heads of the second block: there is a prefix to replay
    batch = sources.scoring[0]
    reference = observe(model, structure, batch, 64, torch.Generator().manual_seed(0))
    trajectory, output = exact_losses(model, structure, group, [reference], 1.0)
    get_layer(model, group.consumer).weight.data[:, 0 : group.width] = 0.0
    changed = observe(model, structure, batch, 64, torch.Generator().manual_seed(0))
    expected = sum(
        float((relation(changed.rows[path]) - relation(reference.rows[path])).square().sum()) / len(reference)
        for path in structure.blocks[1:]
    )
    assert trajectory[0] == pytest.approx(expected, rel=1e-3)
    moved = divergence(model.output_kind, reference.output, changed.output, 1.0).mean()
    assert output[0] == pytest.approx(float(moved), rel=1e-3)


def test_same_seed_same_scores(sources: Sources) -> None:
    first, second, other = run(sources, 12, 3), run(sources, 12, 3), run(sources, 12, 4)
    assert first[1] == second[1]
    assert all(np.array_equal(first[0][key], second[0][key]) for key in first[0])
    assert any(not np.array_equal(first[0][key], other[0][key]) for key in first[0])


def with_padding(batch: Batch) -> Batch:
    extra = {name: torch.nn.functional.pad(tensor, (0, 5)) for name, tensor in batch.inputs.items()}
    return Batch(extra, batch.rows)


def reversed_rows(batch: Batch) -> Batch:
    return Batch({name: tensor.flip(0) for name, tensor in batch.inputs.items()}, batch.rows[::-1])


@pytest.mark.parametrize("change", [with_padding, reversed_rows])
def test_padding_and_order_change_nothing(sources: Sources, change: Any) -> None:
    """The loss itself stays the same; the sketch draws other directions, and still gives the same ranking."""
    model, structure = sources.model.double(), find_structure(sources.model)
    changed = tuple(change(batch) for batch in sources.scoring)
    settings = config(rows=32 * 20, score="optin-exact")  # every token of every sentence
    first = score(model, structure.only(["heads"]), sources.scoring, settings, seed=0).values
    second = score(model, structure.only(["heads"]), changed, settings, seed=0).values
    for key in first:
        np.testing.assert_allclose(first[key], second[key], rtol=1e-6)
    estimates = [sketched(structure, run(sources, 64, 0, batches)[0]) for batches in (sources.scoring, changed)]
    assert spearmanr(*estimates).statistic > 0.97


def test_scores_follow_their_units_through_a_permutation(sources: Sources) -> None:
    """No prior on the index of a unit: neurons in another order get the same scores in that order."""
    first, _ = run(sources, 16)
    structure = find_structure(sources.model)
    group = next(group for group in structure.groups if group.kind == "neurons")
    order = torch.randperm(group.count, generator=torch.Generator().manual_seed(1))
    permute_neurons(sources.model, group, order)
    second, _ = run(sources, 16)
    np.testing.assert_allclose(second[group.key], first[group.key][order.numpy()], rtol=1e-2)


def permute_neurons(model: TaskModel, group: Any, order: torch.Tensor) -> None:
    up, down = get_layer(model, group.producers[0].path), get_layer(model, group.consumer)
    assert up.bias is not None
    up.weight.data, up.bias.data = up.weight.data[order], up.bias.data[order]
    down.weight.data = down.weight.data[:, order]


def test_a_unit_without_effect_scores_nothing(sources: Sources) -> None:
    structure = find_structure(sources.model)
    for group in structure.groups[:2]:
        sources.model.get_submodule(group.consumer).weight.data[:, : group.width] = 0.0
    scores = score(sources.model, structure, sources.scoring, config(), seed=0)
    for group in structure.groups[:2]:
        assert scores.values[group.key][0] < 1e-8 < scores.values[group.key][1:].min()
    assert scores.values[structure.groups[1].key][0] == 0.0
    assert 1 <= scores.info["without_effect"] <= 2  # a head may move the last bit of something


@pytest.mark.parametrize("method", ["optin", "auto"])
def test_a_channel_without_effect_scores_nothing(method: str) -> None:
    model, _ = small_model("resnet-timm")
    structure = find_structure(model)
    before = score(model, structure, batches_for(model, 2), config(score=method), seed=0)
    assert before.info["without_effect"] == 0
    for group in structure.groups[-2:]:  # more channels than are masked exactly
        get_layer(model, group.consumer).weight.data[:, 3] = 0.0
    after = score(model, structure, batches_for(model, 2), config(score=method), seed=0)
    assert [after.values[group.key][3] for group in structure.groups[-2:]] == [0.0, 0.0]
    assert after.info["without_effect"] == 2


def test_lambda_gives_both_terms_the_same_weight(classifier: Sources, monkeypatch: pytest.MonkeyPatch) -> None:
    """As exact masking has them, up to the randomness of the probes."""
    monkeypatch.setattr(optin, "SUSPECTS", 0)
    structure = find_structure(classifier.model)
    heads_only = structure.only(["heads"])
    scores, info = scores_of(classifier.model, heads_only, classifier.scoring, config(64))
    references = observe_all(classifier.model, structure, classifier.scoring, 256, torch.Generator().manual_seed(0))
    parts = [exact_losses(classifier.model, structure, group, references, 1.0) for group in heads_only.groups]
    trajectory, output = (sum(part[i].sum() for part in parts) for i in (0, 1))
    assert info["lambda"] == pytest.approx(trajectory / output, rel=0.3)
    assert sum(values.sum() for values in scores.values()) == pytest.approx(2 * trajectory, rel=0.3)


def test_heads_are_ranked_as_exact_masking_does(classifier: Sources, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optin, "SUSPECTS", 0)
    heads = find_structure(classifier.model).only(["heads"])
    found, _ = scores_of(classifier.model, heads, classifier.scoring, config(64))
    exact = score(classifier.model, heads, classifier.scoring, config(score="optin-exact"), seed=0).values
    every = [np.concatenate([one[group.key] for group in heads.groups]) for one in (found, exact)]
    assert spearmanr(*every).statistic > 0.9


@pytest.mark.parametrize("name", ["bert", "vit", "resnet-timm"])
def test_few_probes_rank_as_many_do(name: str) -> None:
    """16 probes against 512, and the estimate of that correlation that the report shows."""
    model, _ = small_model(name)
    structure, batches = find_structure(model), batches_for(model, 1, size=16)
    few, facts = scores_of(model, structure, batches, config(16))
    many, _ = scores_of(model, structure, batches, config(512), seed=1)
    correlation = float(spearmanr(sketched(structure, few), sketched(structure, many)).statistic)
    assert correlation >= 0.97
    assert facts["rank_correlation"] == pytest.approx(correlation, abs=0.02)


def test_auto_stops_when_the_ranking_is_stable(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = small_model("vit")
    structure, batches = find_structure(model), batches_for(model, 1)
    _, facts = scores_of(model, structure, batches, config("auto"))
    assert 8 <= facts["probes"] <= sketch.MAX_PROBES and facts["probes"] % (2 * sketch.CHUNK) == 0
    assert facts["rank_correlation"] >= sketch.ENOUGH or facts["probes"] == sketch.MAX_PROBES
    assert 0.5 < facts["cut_agreement"] <= 1.0
    for enough, probes in ((0.0, 2 * sketch.CHUNK), (2.0, sketch.MAX_PROBES)):
        monkeypatch.setattr(sketch, "ENOUGH", enough)
        monkeypatch.setattr(optin, "ENOUGH", enough)
        assert scores_of(model, structure, batches, config("auto"))[1]["probes"] == probes


def test_a_number_of_probes_is_kept() -> None:
    model, _ = small_model("resnet-cifar")
    structure, batches = find_structure(model), batches_for(model, 1, size=2)
    for probes in (1, 5):
        values, facts = scores_of(model, structure, batches, config(probes))
        assert facts["probes"] == probes
        assert ("rank_correlation" in facts) == (probes > 1)
        assert all(np.isfinite(one).all() for one in values.values())


def test_a_massive_unit_is_found_by_exact_masking(monkeypatch: pytest.MonkeyPatch) -> None:
    """A neuron that dwarfs the stream: the norms behind it saturate, so that its gradient says it does not matter."""
    model, _ = small_model("vit")
    structure, batches = find_structure(model), batches_for(model, 2)
    group, unit = structure.groups[1], 77
    up, down = get_layer(model, group.producers[0].path), get_layer(model, group.consumer)
    assert up.bias is not None
    up.bias.data[unit] = 30.0
    down.weight.data[:, unit] *= 30.0
    values, facts = scores_of(model, structure, batches, config(16))
    assert facts["masked_exactly"] == 1
    assert values[group.key].argmax() == unit
    assert values[group.key][unit] > np.median(sketched(structure, values))
    monkeypatch.setattr(optin, "SUSPECTS", 0)
    blind, facts = scores_of(model, structure, batches, config(16))
    assert facts["masked_exactly"] == 0
    assert blind[group.key][unit] < 1e-3 * values[group.key][unit]


def test_every_step_is_reported() -> None:
    """Progress reaches its end and never runs backwards."""
    model, _ = small_model("bert")
    structure, batches = find_structure(model), batches_for(model, 1, size=2)
    for method in ("optin", "optin-exact"):
        seen: list[tuple[int, int]] = []
        with reporting(lambda *step, seen=seen: seen.append(step)):
            score(model, structure, batches, config(24, score=method), 0)
        assert len({total for _, total in seen}) == 1
        assert [done for done, _ in seen] == sorted(done for done, _ in seen)
        assert seen[-1][0] == seen[-1][1]


@pytest.mark.parametrize("value", [float("nan"), 3e38])
@pytest.mark.parametrize(("name", "method"), [("vit", "optin"), ("resnet-timm", "optin")])
def test_scores_that_are_not_finite_are_refused(name: str, method: str, value: float) -> None:
    model, _ = small_model(name)
    batches = [Batch({"pixel_values": torch.full_like(inputs_for(model, 4, 0)["pixel_values"], value)}, np.arange(4))]
    with pytest.raises(InputError, match="not finite"):
        score(model, find_structure(model), batches, config(4, score=method), seed=0)


@pytest.mark.parametrize("name", ["vit", "resnet-timm"])
def test_constant_images_have_finite_scores(name: str) -> None:
    model, _ = small_model(name)
    batches = [Batch({"pixel_values": torch.zeros_like(inputs_for(model, 4, 0)["pixel_values"])}, np.arange(4))]
    scores = score(model, find_structure(model), batches, config(4), seed=0)
    assert all(np.isfinite(values).all() and (values >= 0).all() for values in scores.values.values())
