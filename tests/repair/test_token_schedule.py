"""Schedules on a model: what merging costs per block, what units cost behind it, and streams un-merged."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from optin_export.errors import InputError
from optin_export.models import TaskModel, wrap
from optin_export.objective import mean_output_loss, observe
from optin_export.pruning import count_tokens, insert_merging
from optin_export.pruning.token_merging import DroppedTokens, flow_of, places
from optin_export.recipe import TokensSection
from optin_export.repair import scheduled, token_schedule
from optin_export.repair.token_schedule import TRIALS, free_blocks, merging_curves, share_budget
from optin_export.search import Plan, kept_share, spread_merging
from optin_export.units import count_macs, find_structure, find_tokens, measure_costs
from tests.repair.plans import halved
from tests.units.models import batches_for, inputs_for, small_model


@pytest.mark.parametrize("name", ["vit", "deit-distilled", "vit-transformers", "bert"])
def test_costs_are_those_of_the_merged_model_as_shares_of_the_unmerged(name: str) -> None:
    model, _ = small_model(name)
    structure, one = find_structure(model), inputs_for(model, 1, 0)
    merged, costs = scheduled(model, structure, TokensSection(schedule=(3, 1)), one)
    built = insert_merging(model, structure, find_tokens(model), merged)
    assert merged == (3, 1)
    assert costs.macs == count_macs(built, one) < costs.whole("macs") == count_macs(model, one)
    assert costs.of("macs", {}) == costs.macs
    assert costs.whole("params") == costs.params == measure_costs(model, structure, one).params


def test_keeping_all_leaves_the_costs_alone() -> None:
    model, _ = small_model("vit")
    structure, one = find_structure(model), inputs_for(model, 1, 0)
    for section in (TokensSection(), TokensSection(schedule=(0, 0))):
        assert scheduled(model, structure, section, one) == ((), measure_costs(model, structure, one))


def test_outputs_with_a_row_per_token_are_refused() -> None:
    model, _ = small_model("bert")
    model.output_layout = "tokens"
    with pytest.raises(InputError, match="a row per token"):
        scheduled(model, find_structure(model), TokensSection(keep=0.8), inputs_for(model, 1, 0))


class Grid(torch.nn.Module):
    """A classifier around a ViT, whose code arranges the patches' tokens as an image."""

    def __init__(self, vit: torch.nn.Module) -> None:
        super().__init__()
        self.vit = vit

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        tokens = self.vit.forward_features(pixel_values)[:, 1:]  # type: ignore[operator]
        return tokens.reshape(len(tokens), 4, 4, tokens.shape[2]).amax((1, 2))


def test_a_model_whose_code_needs_every_token_is_refused() -> None:
    model, _ = small_model("vit")
    inputs = inputs_for(model, 1, 0)
    wrapped = wrap(Grid(model.model), "image-classification")
    with pytest.raises(InputError, match="its code needs all of them: shape"):
        scheduled(wrapped, find_structure(wrapped), TokensSection(keep=0.8), inputs)


def test_blocks_of_a_vit_in_another_model_are_refused() -> None:
    """MobileViT unfolds images to tokens and back around such blocks; convolutions are its other units."""
    import timm

    model = wrap(timm.create_model("mobilevit_xxs").eval(), "image-classification")
    with pytest.raises(InputError, match="its blocks are in a ImageModel, whose code may read each token"):
        find_tokens(model)


def test_merging_more_costs_more_and_nothing_costs_nothing() -> None:
    model, _ = small_model("vit")
    structure, tokens = find_structure(model), find_tokens(model)
    count = count_tokens(model, structure, inputs_for(model, 1, 0))
    generator = torch.Generator().manual_seed(0)
    references = [observe(model, structure, batch, 24, generator) for batch in batches_for(model, 2)]
    curves = merging_curves(model, structure, tokens, count, references, 1.0)
    assert count == 17 and len(curves) == 3
    for curve in curves:
        assert curve[0].tolist() == [0, 0]
        assert (np.diff(curve[:, 0]) > 0).all() and curve[-1, 0] <= 8
    # Behind the last attention the class token, which is all that is read, sees no other token.
    assert np.allclose(curves[-1][:, 1], 0, atol=1e-6)
    for block, curve in enumerate(curves[:-1]):
        assert curve[-1, 1] > curve[1, 1] > 1e-6
        # As in a pass of the whole model.
        merged = insert_merging(model, structure, tokens, [*[0] * block, int(curve[-1, 0])])
        assert curve[-1, 1] == pytest.approx(mean_output_loss(merged, references, 1.0), rel=1e-5)


def test_the_last_block_of_a_classifier_merges_for_nothing() -> None:
    zero, rising = np.array([[0.0, 0.0], [4.0, 0.0]]), np.array([[0.0, 0.0], [4.0, 0.1]])
    assert [free_blocks(curves) for curves in ([rising, zero], [zero, rising], [zero, zero], [rising, zero, zero])] == [
        1,
        0,
        0,
        2,
    ]
    assert spread_merging(0.8, 17, 1, 3) == (2, 2, 2)
    assert spread_merging(0.8, 17, 1, 3, free=1) == (1, 1, 7)  # half of the 14 patches that are left
    assert kept_share((1, 1, 7), 17, 3) <= 0.8 < kept_share((0, 1, 7), 17, 3)


@pytest.mark.parametrize("minimum", [1.0, 0.7, 0.62, 0.55])
@pytest.mark.parametrize("known", [True, False])
def test_the_search_ends_near_the_least_loss(minimum: float, known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss of one minimum, and a budget that about 0.65 of the tokens meet without removing a unit."""
    model, _ = small_model("vit")
    structure, one = find_structure(model), inputs_for(model, 1, 0)
    costs = measure_costs(model, structure, one)
    plan = halved(structure)
    kept = {}

    def built(plan: Plan) -> TaskModel:
        made = insert_merging(model, structure, find_tokens(model), plan.merged)
        kept[id(made)] = made, kept_share(plan.merged, 17, 3)
        return made

    def loss(made: TaskModel, references: object, temperature: float) -> float:
        return abs(kept[id(made)][1] - minimum) if id(made) in kept else 0.0

    monkeypatch.setattr(token_schedule, "mean_output_loss", loss)
    macs = 0.65
    found, tried = share_budget(
        model,
        structure,
        one,
        costs,
        batches_for(model, 2),
        lambda costs: plan,
        built,
        macs=macs,
        temperature=1.0,
        seed=0,
        unmerged=(plan, 1 - minimum) if known else None,
    )
    shares = [share for share, _ in tried]
    assert shares[0] == 1.0 and len(tried) <= TRIALS
    alone = shares[1]
    step = token_schedule.STEP
    merged = next(made for made, share in kept.values() if share == alone)
    assert macs - 0.1 < count_macs(merged, one) / costs.macs <= macs
    assert kept_share(found.merged, 17, 3) == min(tried, key=lambda pair: pair[1])[0]
    # As far as TRIALS goes from there, in one direction.
    reached = max(min(minimum, alone + (TRIALS - 3) * step), alone - (TRIALS - 3) * step)
    assert abs(kept_share(found.merged, 17, 3) - (1.0 if minimum == 1 else reached)) <= step + 0.02


def test_un_merging_gives_every_token_the_row_that_stands_for_it() -> None:
    gone = DroppedTokens(torch.tensor([[0, 1, 1, 2]]), torch.tensor([[1.0, 2.0, 1.0]]))
    rows = torch.tensor([[[1.0], [2.0], [4.0], [8.0]]])
    assert gone.sums(rows).flatten().tolist() == [1, 6, 8]
    assert gone.means(rows).flatten().tolist() == [1, 3, 8]
    assert gone.spread(gone.means(rows)).flatten().tolist() == [1, 3, 3, 8]


def test_places_follow_tokens_through_several_blocks() -> None:
    model, _ = small_model("deit-distilled")
    merged = insert_merging(model, find_structure(model), find_tokens(model), (4, 3, 2))
    found = places(merged, inputs_for(model, 3, 0))
    flow = flow_of(merged)
    assert found is not None and flow is not None and flow.sizes is not None and not flow.trace
    assert found.shape == (3, 18) and flow.sizes.shape == (3, 9)
    for row, sizes in zip(found, flow.sizes, strict=True):
        assert row[:2].tolist() == [0, 1] and (row[2:] > 1).all()  # class and distillation token stand for themselves
        assert torch.bincount(row, minlength=9).tolist() == sizes.tolist()
    assert places(model, inputs_for(model, 1, 0)) is None
