"""The losses: what is compared, per sample, and that probes square to them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from optin_export.data import Batch
from optin_export.objective import (
    Observation,
    OutputNoise,
    divergence,
    normalised_rows,
    observe,
    output_probe,
    relation,
    trajectory_losses,
    trajectory_probe,
)
from optin_export.scoring import exact
from optin_export.units import find_structure
from tests.scoring.masking import exact_losses
from tests.units.models import batches_for, small_model


def reference_of(name: str, rows: int = 6, size: int = 6) -> tuple[torch.nn.Module, Observation]:
    model, _ = small_model(name)
    batch = batches_for(model, 1, size=size)[0]
    return model, observe(model, find_structure(model), batch, rows, torch.Generator().manual_seed(0))


def test_relation_is_cosine_similarity() -> None:
    rows = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]]])
    half = 0.5**0.5
    expected = torch.tensor([[[1.0, 0.0, half], [0.0, 1.0, half], [half, half, 1.0]]])
    torch.testing.assert_close(relation(torch.nn.functional.normalize(rows, dim=-1)), expected)
    alone = torch.randn(2, 1, 4)
    assert relation(alone) is alone  # a single row has no relations


def test_padding_is_never_compared() -> None:
    """Real tokens are drawn before padding; where a sentence is shorter than the number of rows, the rest is zero."""
    _, reference = reference_of("bert", rows=8)
    mask = reference.inputs["attention_mask"]
    (chosen,) = reference.chosen.values()
    assert chosen.shape == (6, 8)
    assert all(len(set(row.tolist())) == 8 for row in chosen)
    for compared in reference.rows.values():
        real = compared.norm(dim=-1) > 0.5
        assert (real == mask.gather(1, chosen).bool()).all()
        assert (real.sum(1) == mask.sum(1).clamp(max=8)).all()


def test_every_resolution_has_its_own_rows() -> None:
    """A convolutional network has fewer positions in later blocks, and one at the end."""
    _, reference = reference_of("resnet-timm", rows=8)
    assert {shape: tuple(rows.shape) for shape, rows in reference.chosen.items()} == {
        (6, 64): (6, 8), (6, 16): (6, 8), (6, 4): (6, 4), (6, 1): (6, 1),
    }  # fmt: skip
    for rows in reference.rows.values():
        torch.testing.assert_close(rows.norm(dim=-1), torch.ones(rows.shape[:2]))


def test_losses_do_not_mix_samples() -> None:
    """Another sample in the batch changes nothing; a copy of the batch gives every sample's loss again."""
    model, reference = reference_of("vit", size=3)
    structure = find_structure(model)
    moved = {path: hidden + torch.randn(hidden.shape) for path, hidden in reference.hidden.items()}
    losses = trajectory_losses(reference, moved, structure.blocks, structure.channels_first)
    assert losses.shape == (3,) and (losses > 0).all()
    stirred = {path: torch.cat([hidden[:2], torch.randn(hidden[2:].shape)]) for path, hidden in moved.items()}
    torch.testing.assert_close(
        trajectory_losses(reference, stirred, structure.blocks, structure.channels_first)[:2], losses[:2]
    )
    twice = {path: torch.cat([hidden, reference.hidden[path]]) for path, hidden in moved.items()}
    both = trajectory_losses(reference, twice, structure.blocks, structure.channels_first)
    torch.testing.assert_close(both[:3], losses)
    assert both[3:].abs().max() < 1e-10


def test_output_losses_by_kind() -> None:
    generator = torch.Generator().manual_seed(0)
    before, after = (torch.randn(3, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    p, q = (torch.softmax(logits / 2.0, -1) for logits in (before, after))
    torch.testing.assert_close(divergence("logits", before, after, 2.0), (p * (p / q).log()).sum(-1))
    torch.testing.assert_close(divergence("regression", before, after, 1.0), (before - after).square().sum(-1))
    assert divergence("embedding", before, 3 * before, 1.0).max() < 1e-20  # only directions count


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_output_probe_squares_to_the_divergence(temperature: float) -> None:
    """E[(gradient of the probe . step)^2] is KL(p || p') to second order."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.tensor([[[1.0, -0.5, 0.3]]], dtype=torch.float64)
    step = torch.tensor([[[1e-2, -2e-2, 5e-3]]], dtype=torch.float64)
    noise = OutputNoise(generator)
    squares = []
    for _ in range(3):  # as many as classes: exact
        at = logits.clone().requires_grad_(True)
        probe = output_probe("logits", at, temperature, noise.draw(0, at), torch.ones(1, 1))
        (gradient,) = torch.autograd.grad(probe, at)
        squares.append(float((gradient * step).sum() ** 2))
    expected = float(divergence("logits", logits, logits + step, temperature))
    assert np.mean(squares) == pytest.approx(expected, rel=0.02)


def test_trajectory_probe_squares_to_the_trajectory_loss() -> None:
    """E[(v . dr)^2] over v is the loss of a small step, also for a block with a single row."""
    generator = torch.Generator().manual_seed(0)
    blocks = [torch.nn.functional.normalize(torch.randn(1, rows, 3, generator=generator), dim=-1) for rows in (4, 1)]
    steps = [1e-2 * torch.randn(block.shape, generator=generator) for block in blocks]
    expected = sum(
        float((relation(block + step) - relation(block)).square().sum())
        for block, step in zip(blocks, steps, strict=True)
    )
    squares = []
    for _ in range(2000):
        at = [block.clone().requires_grad_(True) for block in blocks]
        gradients = torch.autograd.grad(trajectory_probe(at, generator), at)
        change = sum(float((g * step).sum()) for g, step in zip(gradients, steps, strict=True))
        squares.append(change**2)
    assert np.mean(squares) == pytest.approx(expected, rel=0.1)


def test_output_noise_is_white_and_orthogonal_in_turn() -> None:
    noise = OutputNoise(torch.Generator().manual_seed(0))
    output = torch.zeros(3, 2, 5)
    for _ in range(2):  # every run of five, for every batch on its own
        drawn = torch.stack([noise.draw(batch, output) for _ in range(5) for batch in (0, 1)]).flatten(1, 2)
        for part in (drawn[::2], drawn[1::2]):
            outer = torch.einsum("psi,psj->sij", part, part) / 5
            torch.testing.assert_close(outer, torch.eye(5).expand(6, 5, 5), atol=1e-5, rtol=0)
    wide = OutputNoise(torch.Generator().manual_seed(0)).draw(0, torch.zeros(2, 1, 1000))
    assert float(wide.std()) == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("name", ["bert", "bert-spans", "gpt2", "resnet-timm", "vgg-bn"])
def test_many_units_in_one_pass_are_one_at_a_time(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exact masking: copies of the samples with another unit masked in each, against a pass per unit and per batch."""
    model, _ = small_model(name)
    structure = find_structure(model.double())
    generator = torch.Generator().manual_seed(0)
    batches = batches_for(model, 2, size=3)
    for batch in batches:
        batch.inputs.update({key: value.double() for key, value in batch.inputs.items() if value.is_floating_point()})
    references = [observe(model, structure, batch, 6, generator) for batch in batches]
    for group in structure.groups[1::2]:
        units = [5, 0, 3] if group.kind != "heads" else [2, 0]
        together = exact_losses(model, structure, group, references, 1.0, units)
        monkeypatch.setattr(exact, "ROWS_PER_PASS", 1)
        alone = exact_losses(model, structure, group, references, 1.0)
        monkeypatch.undo()
        for first, second in zip(together, alone, strict=True):
            np.testing.assert_allclose(first, second[units], rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("name", ["bert-tokens", "bert-spans", "distilbert-masked", "gpt2", "llama"])
def test_outputs_of_padding_are_never_compared(name: str) -> None:
    """A distribution per token, or over tokens: longer padding changes no loss."""
    model, _ = small_model(name)
    structure, losses = find_structure(model), []
    batch = batches_for(model, 1, size=4)[0]
    padded = {
        key: torch.nn.functional.pad(value, (0, 5), value=key == "input_ids") for key, value in batch.inputs.items()
    }
    for one in (batch, Batch(padded, batch.rows)):
        reference = observe(model, structure, one, 64, torch.Generator().manual_seed(0))
        assert float(reference.weights.sum()) == pytest.approx(4.0)
        losses.append(exact_losses(model, structure, structure.groups[1], [reference], 1.0))
    for first, second in zip(*losses, strict=True):
        np.testing.assert_allclose(first, second, rtol=2e-3, atol=1e-7)


def test_copies_of_a_reference_are_normalised_alike() -> None:
    _, reference = reference_of("bert", size=2)
    path, hidden = next(iter(reference.hidden.items()))
    tensor = hidden if isinstance(hidden, torch.Tensor) else hidden[0]
    rows = normalised_rows(tensor.repeat(3, 1, 1), reference.mask, reference.chosen, False)
    torch.testing.assert_close(rows, reference.rows[path].repeat(3, 1, 1))
