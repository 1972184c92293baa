"""Models whose blocks are no chain: whatever scores and repairs see is what a plain forward pass gives."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from optin_export import scoring, units
from optin_export.data import Batch
from optin_export.errors import InputError
from optin_export.models import TaskModel, build
from optin_export.objective import divergence, observe
from optin_export.recipe import PruneSection
from optin_export.repair import RepairSettings, apply_plan, loss_curves, sensitivities
from optin_export.repair import curves as curves_module
from optin_export.repair.paired_forward import Point, Stream
from optin_export.scoring.activation import contributions
from optin_export.units import Calls, Structure, find_structure, get_module, masked, measured, notices, tensors_in
from tests.conftest import enlarge
from tests.repair.plans import halved
from tests.scoring.masking import exact_losses

FILE = Path(__file__).parent / "topologies.py"
TEXT = ("tuple", "dict", "dataclass")
#: Walked with the outputs of earlier blocks in their place, or by whole passes.
PLACED = ("chain", "reversed", "branches", "dense", "in place", "auxiliary", "time first", "parts", "checkpoint", *TEXT)
WHOLE = ("state", "layers", "recurrent")
CONVOLUTIONAL = ("unet", "hrnet")
TIMM = {
    "hrnet": ("hrnet_w18_small", {}),
    "mobilevit": ("mobilevit_xxs", {}),  # its blocks see each image in four parts
    "crossvit": ("crossvit_tiny_240", {"embed_dim": (16, 32), "num_heads": (2, 2), "img_size": 120}),
}
EVERY = (*PLACED, *WHOLE, "unet", *TIMM)


@pytest.fixture(autouse=True, scope="module")
def own_family() -> Iterator[None]:
    """The family that the models of this file register is forgotten after it."""
    known = dict(units._registered)
    yield
    units._registered.clear()
    units._registered.update(known)


@cache
def model_of(kind: str) -> TaskModel:
    if kind in TIMM:
        name, args = TIMM[kind]
        architecture: dict[str, Any] = {"library": "timm", "name": name, "args": {**args, "num_classes": 5}}
    else:
        function, args = {"unet": ("unet", {}), "recurrent": ("recurrent", {})}.get(kind, ("tower", {"kind": kind}))
        architecture = {"library": "python", "source": f"py:{FILE}:{function}", "args": args}
    task = "text-classification" if kind in TEXT else "image-classification"
    model = build({**architecture, "task": task, "pooling": None, "normalize": False}, trust_python=True)
    if kind not in CONVOLUTIONAL:
        enlarge(model, 0)
    return model


def batches_of(kind: str, sizes: Sequence[int] = (3, 2, 4)) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    side = {"hrnet": 64, "mobilevit": 64, "crossvit": 120}.get(kind, 32)
    found = []
    sizes = sizes[:3] if kind == "hrnet" else sizes
    for number, size in enumerate(sizes):
        inputs = {"pixel_values": torch.randn(size, 3, side, side, generator=generator)}
        if kind in TEXT:
            ids = torch.randint(1, 64, (size, 9 + number), generator=generator)
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        found.append(Batch(inputs, np.arange(size)))
    return found


@cache
def structure_of(kind: str) -> Structure:
    model = model_of(kind)
    return measured(model, find_structure(model), batches_of(kind)[0].inputs)


def whole(structure: Structure) -> Structure:
    """The same structure, every pass of which is a whole one."""
    assert structure.walk is not None
    return dataclasses.replace(structure, walk=dataclasses.replace(structure.walk, whole="for a test"))


def plainly(model: nn.Module, points: Sequence[Point], inputs: dict[str, torch.Tensor]) -> dict[Point, list[Any]]:
    """What one forward pass has at these points, call by call; copied, for the model may write over it."""
    seen: dict[Point, list[Any]] = {}

    def before(point: Point) -> Any:
        return lambda module, args: seen.setdefault(point, []).append(args[point[1]].clone())

    def after(point: Point) -> Any:
        return lambda module, args, output: seen.setdefault(point, []).append(
            [tensor.clone() for tensor in tensors_in(output)]
        )

    with contextlib.ExitStack() as stack, torch.no_grad():
        for point in points:
            module = get_module(model, point[0])
            handle = (
                module.register_forward_hook(after(point))
                if point[1] == "output"
                else module.register_forward_pre_hook(before(point))
            )
            stack.callback(handle.remove)
        model(**inputs)
    return seen


@pytest.mark.parametrize("kind", EVERY)
def test_what_is_seen_is_what_a_plain_pass_has(kind: str) -> None:
    """At every group of every block, in every batch, through the stream that curves and repairs walk with."""
    model, structure, batches = model_of(kind), structure_of(kind), batches_of(kind)
    assert structure.walk is not None and bool(structure.walk.whole) == (kind in WHOLE)
    points: dict[int, list[Point]] = {block: [] for block in structure.order}
    for group in structure.groups:
        beside = [] if group.residual is None else [group.residual]
        points[group.block] += [(group.consumer, 0), (group.consumer, "output"), (group.producers[0].path, "output")]
        points[group.block] += beside
    points = {block: list(dict.fromkeys(one)) for block, one in points.items()}
    every = list(dict.fromkeys(point for one in points.values() for point in one))
    expected = [plainly(model, every, batch.inputs) for batch in batches]
    stream, compared = Stream(model, structure, batches), 0
    for block in structure.order:
        for index in range(len(batches)):
            found = stream.see(index, points[block], structure.blocks[block])
            for point in points[block]:
                value = found[point] if isinstance(found[point], Calls) else [found[point]]
                pairs = zip(tensors_in(list(value)), tensors_in(expected[index][point]), strict=True)
                for one, other in pairs:
                    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
                    compared += 1
        stream.advance(block)
    stream.close()
    assert compared >= 3 * len(batches) * len(structure.groups)


@pytest.mark.parametrize("kind", EVERY)
def test_masked_losses_are_those_of_masked_passes(kind: str) -> None:
    """The loss of a unit, from batches of copies with earlier blocks in place, is that of a loop over plain passes."""
    model, structure = model_of(kind), structure_of(kind)
    reference = observe(model, structure, batches_of(kind)[0], 8, torch.Generator().manual_seed(0))
    groups = structure.groups if kind not in CONVOLUTIONAL else structure.groups[:: max(1, len(structure.groups) // 5)]
    for group in groups:
        units = [0, group.count - 1]
        _, found = exact_losses(model, structure, group, [reference], 1.0, units)
        for unit, loss in zip(units, found, strict=True):
            mask = torch.ones(group.count)
            mask[unit] = 0.0
            with torch.no_grad():
                base = model(**reference.inputs)
                with masked(model, [group], {group.key: mask}):
                    changed = model(**reference.inputs)
            expected = float(divergence("logits", base, changed, 1.0).mean())
            assert loss == pytest.approx(expected, rel=0.02, abs=1e-6)


@pytest.mark.parametrize(
    "kind", ["unet", pytest.param("crossvit", marks=pytest.mark.slow), "branches", "dense", "tuple", "reversed"]
)
def test_with_outputs_in_place_all_is_as_by_whole_passes(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores, loss curves and repaired weights; and a curve ends at no loss with all units."""
    model, structure, batches = model_of(kind), structure_of(kind), batches_of(kind)
    assert structure.walk is not None and structure.walk.whole is None
    if len(structure.groups) > 10:  # a few blocks of several branches, so that the test stays short
        some = (structure.groups[5], structure.groups[14], structure.groups[-1])
        structure, batches = dataclasses.replace(structure, groups=some), batches[:1]
        monkeypatch.setattr(curves_module, "POINTS", 2)
    config = PruneSection(budget={"macs": 0.5}, score="optin", rows=64, probes=4)  # type: ignore[arg-type]
    results = []
    for one in (structure, whole(structure)):
        scores = scoring.score(model, one, batches, config, 0).values
        least = {group.key: 1 for group in one.groups}
        curves = loss_curves(model, one, scores, batches, batches[:1], RepairSettings(), least=least)
        operation = apply_plan(model, one, halved(one), batches, batches[0].inputs, RepairSettings())
        results.append((scores, curves, operation))
        assert all(curve[-1].tolist() == [group.count, 0, 0] for group, curve in zip(one.groups, curves.values()))  # noqa: B905
        assert operation.masked_difference <= 1e-5
    for key in results[0][0]:
        # Positions without any activation make cosines of rounding: they differ on the few rows of masked units.
        np.testing.assert_allclose(results[0][0][key], results[1][0][key], rtol=0.2, atol=1e-6)
        np.testing.assert_allclose(results[0][1][key], results[1][1][key], rtol=2e-3, atol=1e-7)
    states = [operation.dense.state_dict() for _, _, operation in results]
    for name, tensor in states[0].items():
        torch.testing.assert_close(tensor, states[1][name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["unet", "hrnet", "recurrent", "state", "dense", "dict", "in place"])
def test_the_repair_brings_the_output_back(kind: str) -> None:
    """The repaired model is nearer to the original than the one that only lost units, on rows it has not seen."""
    model, structure, batches = model_of(kind), structure_of(kind), batches_of(kind, (16,) * 8)
    if kind == "hrnet":  # a few blocks of several branches, so that the test stays short
        some = (structure.groups[5], structure.groups[14], structure.groups[-1])
        structure = dataclasses.replace(structure, groups=some)
    plan = halved(structure, 0.75)
    dense = [
        apply_plan(model, structure, plan, batches[:-1], batches[0].inputs, RepairSettings(repair=repair)).dense
        for repair in (False, True)
    ]
    with torch.no_grad():
        wanted, bare, repaired = (one(**batches[-1].inputs) for one in (model, *dense))
    assert (repaired - wanted).square().mean() < (bare - wanted).square().mean()


def test_a_layer_that_runs_twice_is_scored_by_both_calls() -> None:
    """A channel that only the first call of its block uses is not called dead."""
    model, structure, batches = model_of("recurrent"), structure_of("recurrent"), batches_of("recurrent")
    group = structure.groups[-1]
    (found,) = contributions(model, [group], batches[:1]).values()
    layer: Any = get_module(model, group.consumer)
    calls = plainly(model, [(group.consumer, 0)], batches[0].inputs)[(group.consumer, 0)]
    assert len(calls) == 2
    squares = torch.stack([call.square().mean((0, 2, 3)) for call in calls]).mean(0)
    expected = squares * layer.weight.square().sum((0, 2, 3))
    np.testing.assert_allclose(found.energy, expected.detach().numpy(), rtol=1e-4)
    weights = sensitivities(model, structure, batches[:1], 0).of(0, [group.consumer])
    assert weights is not None and len(weights) == 2 * 3 * min(64, calls[0].shape[2] * calls[0].shape[3])


def test_what_a_chain_reads_is_found_out_and_nothing_is_told() -> None:
    structure = structure_of("chain")
    assert structure.walk is not None
    assert structure.order == (0, 1, 2) and structure.before(structure.groups[2]) == structure.blocks[:2]
    assert [structure.walk.last_reader(path) for path in structure.blocks] == [1, 2, 3]
    assert notices(structure) == [] and measured(model_of("chain"), structure, {}) is structure


def test_blocks_run_in_an_order_of_their_own() -> None:
    structure = structure_of("reversed")
    assert structure.order == (2, 1, 0)
    assert structure.before(structure.groups[0]) == (structure.blocks[2], structure.blocks[1])


def test_late_readers_are_found_out() -> None:
    structure = structure_of("unet")
    assert structure.walk is not None
    readers = dict(zip(["down1", "down2", "bottom", "up2", "up1"], structure.walk.readers.values(), strict=True))
    assert readers == {"down1": (4,), "down2": (3,), "bottom": (3,), "up2": (4,), "up1": (5,)}
    bias = structure_of("tuple").walk
    assert bias is not None and list(bias.readers.values()) == [(1, 1), (2, 2), (3, -1)]


def test_what_does_not_run_stays_as_it_is() -> None:
    structure = structure_of("auxiliary")
    assert [group.block for group in structure.groups] == [0, 1, 2]
    assert "block03.neurons" in notices(structure)[0]


def test_whole_passes_are_told_with_the_reason() -> None:
    (notice,) = notices(structure_of("recurrent"))
    assert "slower" in notice and "'model.again' runs 2 times" in notice
    assert "'model.blocks.1'" in notices(structure_of("layers"))[0]


def test_gradients_that_do_not_flow_are_refused() -> None:
    """Neurons would all score zero; what needs no gradients goes on."""
    model, batches = model_of("chain"), batches_of("chain")
    tower: Any = model.model
    wired = tower.run
    try:
        tower.run = torch.no_grad()(wired)
        structure = measured(model, find_structure(model), batches[0].inputs)
        config = PruneSection(budget={"macs": 0.5}, score="optin", rows=64, probes=4)  # type: ignore[arg-type]
        with pytest.raises(InputError, match=r"no gradients flow through 'model\.blocks\.0\.narrow'"):
            scoring.score(model, structure, batches, config, 0)
        assert scoring.score(model, structure, batches, config.model_copy(update={"score": "activation"}), 0).values
    finally:
        del tower.run


def test_a_sample_in_pieces_that_are_not_together_is_refused() -> None:
    """Rows of all samples in turn: masks and losses per sample would mix them."""

    class Mixed(nn.Module):
        def __init__(self, tower: Any) -> None:
            super().__init__()
            self.block = tower.blocks[0]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            rows = self.block(x.transpose(0, 1).reshape(-1, 1, x.shape[-1]))
            return rows.reshape(x.shape[1], x.shape[0], -1).transpose(0, 1).mean(1)

    model = Mixed(model_of("chain").model)
    with pytest.raises(InputError, match="cannot be distinguished by sample"):
        measured(model, find_structure(model), {"x": torch.randn(2, 4, 16)})


def test_a_model_that_never_calls_its_blocks_is_refused() -> None:
    class Bare(nn.Module):
        def __init__(self, tower: Any) -> None:
            super().__init__()
            self.tower = tower

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            block = self.tower.blocks[0]
            return block.narrow(block.widen(block.norm(x)))

    model = Bare(model_of("chain").model)
    structure = find_structure(model)
    with pytest.raises(InputError, match="never calls its blocks"):
        measured(model, structure, {"x": torch.randn(2, 4, 16)})
