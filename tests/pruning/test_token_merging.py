"""Token merging: what it conserves, what it never touches, and that every engine computes it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from optin_export.engines import build, load
from optin_export.errors import InputError
from optin_export.export import export_onnx
from optin_export.models import build as build_model
from optin_export.models.tasks import TaskModel
from optin_export.pruning.token_merging import insert_merging, merge
from optin_export.recipe import Target
from optin_export.units import find_structure, find_tokens
from tests.conftest import VIT_ARGS, enlarge
from tests.units import rtx
from tests.units.models import inputs_for, small_model

IMAGE_MODELS = ["vit", "deit3-layer-scale", "deit-distilled", "vit-transformers", "deit-transformers"]
TEXT_MODELS = ["bert", "bert-embedding", "roberta", "electra"]
#: Of 17 or 18 tokens; nothing in the second block.
IMAGE_SCHEDULE = (4, 0, 3)


def output(model: TaskModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs)


def merged_model(name: str, schedule: tuple[int, ...]) -> tuple[TaskModel, TaskModel]:
    model, _ = small_model(name)
    return model, insert_merging(model, find_structure(model), find_tokens(model), schedule)


def stream_and_sizes(tokens: int = 11) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    stream = torch.randn(3, tokens, 6, generator=generator)
    return stream, torch.randint(1, 4, (3, tokens), generator=generator).float()


@pytest.mark.parametrize("merged", [1, 3, 5])
@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_merging_conserves_the_sum_of_size_times_token(merged: int, prefix: int) -> None:
    merged = min(merged, (11 - prefix) // 2)
    stream, sizes = stream_and_sizes()
    shorter, left, _ = merge(stream, sizes, merged, prefix)
    assert shorter.shape == (3, 11 - merged, 6) and left.shape == (3, 11 - merged)
    torch.testing.assert_close(left.sum(1), sizes.sum(1))
    expected = (stream * sizes[:, :, None]).sum(1)
    torch.testing.assert_close((shorter * left[:, :, None]).sum(1), expected, atol=1e-5, rtol=1e-5)


def test_the_prefix_is_never_merged() -> None:
    stream, sizes = stream_and_sizes()
    stream[:, 2:] = stream[:, :1]  # all tokens are alike, also those of the prefix
    shorter, left, _ = merge(stream, sizes, 4, 2)
    torch.testing.assert_close(shorter[:, :2], stream[:, :2])
    assert torch.equal(left[:, :2], sizes[:, :2])


def test_the_most_alike_tokens_become_their_weighted_mean() -> None:
    stream = torch.eye(6)[None].clone()
    stream[0, 3] = (
        2 * stream[0, 2] + 0.1 * stream[0, 5]
    )  # token 2 belongs to the first set (2, 4), token 3 to the other
    sizes = torch.tensor([[1.0, 1.0, 3.0, 1.0, 1.0, 1.0]])
    shorter, left, pairing = merge(stream, sizes, 1, 2)
    mean = (3 * stream[0, 2] + stream[0, 3]) / 4
    torch.testing.assert_close(shorter[0], torch.stack([*stream[0, :2], stream[0, 4], mean, stream[0, 5]]))
    assert left.tolist() == [[1, 1, 1, 4, 1]]
    assert pairing.sums(torch.eye(6)[None])[0, 3].tolist() == [0, 0, 1, 1, 0, 0]


def test_without_sizes_every_token_counts_once() -> None:
    stream, _ = stream_and_sizes()
    for first, second in zip(merge(stream, None, 3, 1)[:2], merge(stream, torch.ones(3, 11), 3, 1)[:2], strict=True):
        torch.testing.assert_close(first, second)


def test_padding_leaves_first_and_enters_no_mean() -> None:
    stream, _ = stream_and_sizes(12)
    sizes = torch.ones(3, 12)
    sizes[0, 8:] = 0  # two padding tokens in each set
    sizes[1, 4:] = 0  # more padding than is merged
    stream[sizes == 0] = 50.0
    shorter, left, _ = merge(stream, sizes, 4, 1, padded=True)
    assert left.sum(1).tolist() == [8, 4, 12]  # no real token is lost
    # Of the second row only padding went: its real tokens are what they were.
    order = stream[1, :4] @ torch.arange(1.0, 7)
    torch.testing.assert_close((shorter[1][left[1] > 0] @ torch.arange(1.0, 7)).sort().values, order.sort().values)
    assert left[1].max() == 1
    # A real token never resembles padding enough to be merged with it.
    expected = (stream * sizes[:, :, None]).sum(1)
    torch.testing.assert_close((shorter * left[:, :, None]).sum(1), expected, atol=1e-4, rtol=1e-4)
    assert shorter.abs().max() < 10


def test_a_real_token_without_a_partner_takes_the_place_of_padding() -> None:
    stream, sizes = stream_and_sizes(6)
    sizes = torch.tensor([[1.0, 1.0, 0.0, 0.0, 0.0, 0.0]] * 3)  # the first set holds token 1, the second only padding
    shorter, left, _ = merge(stream, sizes, 2, 1, padded=True)
    assert left.sum(1).tolist() == [2, 2, 2]
    torch.testing.assert_close((shorter * left[:, :, None]).sum(1), stream[:, :2].sum(1))


def test_what_stays_keeps_its_order() -> None:
    stream, _ = stream_and_sizes(11)
    shorter, _, _ = merge(stream, None, 3, 1)
    first = stream[:, 1::2]
    for row in range(3):
        places = [int((first[row] == token).all(1).nonzero()) for token in shorter[row, 1:3]]
        assert places == sorted(places)


@pytest.mark.parametrize("name", IMAGE_MODELS + TEXT_MODELS)
def test_merging_nothing_is_the_identity(name: str) -> None:
    model, merged = merged_model(name, (0, 0))
    inputs = inputs_for(model, 3, 0)
    assert torch.equal(output(model, inputs), output(merged, inputs))


@pytest.mark.parametrize("name", IMAGE_MODELS)
def test_every_block_computes_on_fewer_tokens(name: str) -> None:
    model, merged = merged_model(name, IMAGE_SCHEDULE)
    structure = find_structure(model)
    tokens = 1 + 16 + (name.startswith("deit-"))
    seen: list[int] = []
    for group in structure.groups:
        layer = merged.get_submodule(group.consumer)
        layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    inputs = inputs_for(model, 3, 0)
    changed = output(merged, inputs)
    assert seen == [tokens, tokens - 4, tokens - 4, tokens - 4, tokens - 4, tokens - 7]
    assert not torch.allclose(changed, output(model, inputs))
    assert sorted(merged.state_dict()) == sorted(model.state_dict())
    assert find_structure(merged).family == structure.family


@pytest.mark.parametrize("name", IMAGE_MODELS)
def test_behind_the_last_attention_merging_changes_nothing_for_the_class_token(name: str) -> None:
    model, merged = merged_model(name, (0, 0, 6))
    inputs = inputs_for(model, 2, 0)
    torch.testing.assert_close(output(merged, inputs), output(model, inputs), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("schedule", [(5, 0, 0), (4, 3, 1)])
def test_merging_copies_loses_nothing(schedule: tuple[int, ...]) -> None:
    """Without positions, patches that look alike are the same token; a merged one has to attract as much attention."""
    model, _ = small_model("vit")
    with torch.no_grad():
        model.model.pos_embed.zero_()  # type: ignore[union-attr,operator]
    image = torch.randn(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    image[:, :, :, 8:] = image[:, :, :, :8].repeat(1, 1, 1, 3)  # every row of patches holds four copies of one
    merged = insert_merging(model, find_structure(model), find_tokens(model), schedule)
    got, expected = (output(one, {"pixel_values": image}) for one in (merged, model))
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("include_prefix", [False, True])
def test_a_mean_over_tokens_weighs_them_by_what_they_stand_for(include_prefix: bool) -> None:
    """Merging copies behind the last attention leaves a mean-pooled model as it is, only with the right weights."""
    args = {**VIT_ARGS, "global_pool": "avg", "pool_include_prefix": include_prefix, "fc_norm": False, "depth": 1}
    architecture = {"library": "timm", "name": "vit_tiny_patch16_224", "args": args, "task": "image-classification"}
    model = build_model({**architecture, "pooling": None, "normalize": False})
    enlarge(model)
    with torch.no_grad():
        model.model.pos_embed.zero_()  # type: ignore[union-attr,operator]
    image = torch.randn(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    image[:, :, :, 8:] = image[:, :, :, :8].repeat(1, 1, 1, 3)  # every row of patches holds four copies of one
    merged = insert_merging(model, find_structure(model), find_tokens(model), (5,))
    got, expected = (output(one, {"pixel_values": image}) for one in (merged, model))
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_attention_pooling_is_refused() -> None:
    args = {**VIT_ARGS, "global_pool": "map", "class_token": False}
    architecture = {"library": "timm", "name": "vit_tiny_patch16_224", "args": args, "task": "image-classification"}
    model = build_model({**architecture, "pooling": None, "normalize": False})
    with pytest.raises(InputError, match="cannot be merged"):
        find_tokens(model)


def test_a_family_without_tokens_is_refused() -> None:
    with pytest.raises(InputError, match="cannot be merged"):
        find_tokens(small_model("resnet-timm")[0])


@pytest.mark.parametrize("name", TEXT_MODELS)
def test_a_row_that_loses_only_padding_keeps_its_output(name: str) -> None:
    model, merged = merged_model(name, (2, 2, 2))
    inputs = inputs_for(model, 3, 0)
    padding = {"input_ids": 1, "attention_mask": 0}
    longer = {key: torch.nn.functional.pad(value, (0, 12), value=padding[key]) for key, value in inputs.items()}
    torch.testing.assert_close(output(merged, longer), output(model, inputs), atol=2e-5, rtol=1e-4)
    assert not torch.allclose(output(merged, inputs), output(model, inputs), atol=1e-3)


def test_what_padding_holds_changes_nothing() -> None:
    model, merged = merged_model("bert-embedding", (2, 2, 2))
    inputs = inputs_for(model, 4, 0)
    other = {**inputs, "input_ids": torch.where(inputs["attention_mask"].bool(), inputs["input_ids"], 7)}
    torch.testing.assert_close(output(merged, inputs), output(merged, other), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["vit", "deit-distilled", "vit-transformers", "bert", "bert-embedding"])
def test_onnxruntime_computes_it_at_any_batch(name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    # Every merging but the first depends on the order in which the one before left the tokens.
    model, merged = merged_model(name, (2, 2, 1) if name in TEXT_MODELS else (4, 3, 2))
    export_onnx(merged, inputs_for(model, 2, 5), tmp_path / "merged.onnx", max_batch=8, sequence=None)
    build(tmp_path / "merged.onnx", Target(), tmp_path / "engine.onnx")
    engine = load(tmp_path / "engine.onnx", Target())
    for batch in (1, 5):
        for identical in (False, True):
            data = inputs_for(model, batch, 11)
            if identical:
                data = {key: value[:1].expand(batch, *value.shape[1:]).contiguous() for key, value in data.items()}
            got = engine.run({key: value.numpy() for key, value in data.items()})[merged.output_name]
            np.testing.assert_allclose(got, output(merged, data).numpy(), atol=1e-4, rtol=1e-4)
            if identical:
                np.testing.assert_allclose(got, np.broadcast_to(got[:1], got.shape), atol=1e-6)


@pytest.mark.rtx
@pytest.mark.parametrize("name", ["vit", "bert-embedding"])
def test_tensorrt_rtx_parses_and_builds_it(name: str, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="pip install 'optin-export[rtx]'")
    model, merged = merged_model(name, (2, 2, 1))
    inputs = inputs_for(model, 2, 5)
    export_onnx(merged, inputs, tmp_path / "merged.onnx", max_batch=8, sequence=None)
    shapes = {key: tuple((batch, *value.shape[1:]) for batch in (1, 2, 8)) for key, value in inputs.items()}
    assert len(rtx.build(tmp_path / "merged.onnx", shapes)) > 1000  # type: ignore[arg-type]
