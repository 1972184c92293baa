"""torch's own attention with separate layers: the same results under every mask, also in torch's own stacks."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from optin_export.models.equivalents import MultiheadAttention, use_equivalents
from optin_export.pruning import verified
from optin_export.units import find_structure
from tests.conftest import enlarge
from tests.pruning.test_verify import check_plans

WIDTH, HEADS, BATCH, LENGTH, SOURCE = 24, 4, 3, 5, 7
GENERATOR = torch.Generator().manual_seed(3)
PADDING = torch.arange(SOURCE) >= torch.tensor([[SOURCE], [4], [2]])
CAUSAL = torch.ones(LENGTH, LENGTH).triu(1).bool()
BY_HEAD = torch.rand(BATCH * HEADS, LENGTH, SOURCE, generator=GENERATOR) < 0.3

MASKS: list[dict[str, Any]] = [
    {},
    {"key_padding_mask": PADDING},
    {"key_padding_mask": torch.zeros(PADDING.shape).masked_fill(PADDING, -1e4)},
    {"attn_mask": torch.rand(LENGTH, SOURCE, generator=GENERATOR) < 0.3},
    {"attn_mask": torch.randn(LENGTH, SOURCE, generator=GENERATOR)},
    {"attn_mask": BY_HEAD},
    {"attn_mask": torch.randn(LENGTH, SOURCE, generator=GENERATOR) < -1.5, "key_padding_mask": PADDING},
    {"need_weights": False},
    {"average_attn_weights": False, "key_padding_mask": PADDING},
]


def swapped(module: nn.Module) -> Any:
    same = copy.deepcopy(module)
    use_equivalents(same)
    assert any(isinstance(part, MultiheadAttention) for part in same.modules())
    assert not any(type(part) is nn.MultiheadAttention for part in same.modules())
    return same


def holder(**args: Any) -> Any:
    return enlarge(nn.ModuleList([nn.MultiheadAttention(WIDTH, HEADS, **args)])).eval()


def given(length: int, features: int, batch_first: bool = True) -> torch.Tensor:
    values = torch.randn(BATCH, length, features, generator=torch.Generator().manual_seed(length))
    return values if batch_first else values.transpose(0, 1)


def assert_same(found: Any, expected: Any) -> None:
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("args", [{"batch_first": True}, {"bias": False}, {"kdim": 20, "vdim": 28}])
def test_cross_attention(args: dict[str, Any], masks: dict[str, Any]) -> None:
    original = holder(**args)
    first = args.get("batch_first", False)
    sizes = (WIDTH, args.get("kdim", WIDTH), args.get("vdim", WIDTH))
    inputs = [given(n, size, first) for n, size in zip((LENGTH, SOURCE, SOURCE), sizes, strict=True)]
    with torch.no_grad():
        assert_same(swapped(original)[0](*inputs, **masks), original[0](*inputs, **masks))


@pytest.mark.parametrize("has_gradients", [True, False])
@pytest.mark.parametrize(
    "masks",
    [
        {},
        {"attn_mask": CAUSAL},
        {"attn_mask": CAUSAL, "is_causal": True, "need_weights": False},
        {"attn_mask": nn.Transformer.generate_square_subsequent_mask(LENGTH), "is_causal": True},
        {"key_padding_mask": PADDING[:, :LENGTH]},
    ],
)
def test_self_attention_with_and_without_the_fused_path(masks: dict[str, Any], has_gradients: bool) -> None:
    original, x = holder(batch_first=True), given(LENGTH, WIDTH)
    with torch.set_grad_enabled(has_gradients):
        assert_same(swapped(original)[0](x, x, x, **masks), original[0](x, x, x, **masks))


def test_one_row_without_a_batch() -> None:
    original = holder()
    query, key = given(LENGTH, WIDTH)[0], given(SOURCE, WIDTH)[0]
    for masks in ({}, {"key_padding_mask": PADDING[1]}, {"attn_mask": BY_HEAD[:HEADS]}):
        assert_same(swapped(original)[0](query, key, key, **masks), original[0](query, key, key, **masks))


def test_fewer_heads_are_what_the_weights_have() -> None:
    original, x = holder(batch_first=True), given(LENGTH, WIDTH)
    attention = swapped(original)[0]
    assert attention.num_heads == HEADS
    rows = torch.cat([torch.arange(6), torch.arange(12, 18)])  # heads 0 and 2 of 4, 6 features each
    for layer in (attention.q_proj, attention.k_proj, attention.v_proj):
        layer.weight, layer.bias = nn.Parameter(layer.weight[rows]), nn.Parameter(layer.bias[rows])
    attention.out_proj.weight = nn.Parameter(attention.out_proj.weight[:, rows])
    with torch.no_grad():
        original[0].out_proj.weight.view(WIDTH, HEADS, 6)[:, [1, 3]] = 0
    masks = {"key_padding_mask": PADDING[:, :LENGTH], "attn_mask": CAUSAL, "need_weights": False}
    assert attention.num_heads == 2
    assert_same(attention(x, x, x, **masks), original[0](x, x, x, **masks))


@pytest.mark.parametrize("args", [{"add_bias_kv": True}, {"add_zero_attn": True}])
def test_what_adds_keys_stays(args: dict[str, Any]) -> None:
    module = holder(**args)
    use_equivalents(module)
    assert type(module[0]) is nn.MultiheadAttention


class OneTensor(nn.MultiheadAttention):
    """As users write it: self-attention that is called with one tensor."""

    def __init__(self, **args: Any) -> None:
        super().__init__(WIDTH, HEADS, **args)

    def forward(self, x: torch.Tensor, **masks: Any) -> Any:  # type: ignore[override]
        return super().forward(x, x, x, **masks)


class ReadsWeights(nn.MultiheadAttention):
    """Code of its own that reads the weights of all projections."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        q, k, v = nn.functional.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
        q, k, v = (one.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for one in (q, k, v))
        return self.out_proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Tagged(nn.MultiheadAttention):
    """Another name only."""


def subclass(attention: nn.Module) -> tuple[Any, Any]:
    """A module with a subclass, and with its equivalent."""
    original = enlarge(nn.ModuleList([attention])).eval()
    same = copy.deepcopy(original)
    use_equivalents(same)
    assert isinstance(same[0], type(attention)) and type(same[0]).__name__ == type(attention).__name__
    return original[0], same[0]


@pytest.mark.parametrize("masks", [{}, {"key_padding_mask": PADDING[:, :LENGTH]}, {"attn_mask": CAUSAL}])
@pytest.mark.parametrize("args", [{"batch_first": True}, {"bias": False}])
def test_a_subclass_keeps_its_methods(args: dict[str, Any], masks: dict[str, Any]) -> None:
    original, same = subclass(OneTensor(**args))
    x = given(LENGTH, WIDTH, args.get("batch_first", False))
    for other in (same, copy.deepcopy(same), pickle.loads(pickle.dumps(same))):
        assert isinstance(other.q_proj, nn.Linear) and other.num_heads == HEADS
        with torch.no_grad():
            assert_same(other(x, **masks), original(x, **masks))


def test_a_subclass_in_which_other_features_are_keys_and_values() -> None:
    original, same = subclass(Tagged(WIDTH, HEADS, kdim=20, vdim=28))
    inputs = [given(n, size, False) for n, size in ((LENGTH, WIDTH), (SOURCE, 20), (SOURCE, 28))]
    with torch.no_grad():
        assert_same(same(*inputs), original(*inputs))


def test_a_subclass_reads_the_weights_of_the_layers() -> None:
    original, same = subclass(ReadsWeights(WIDTH, HEADS, batch_first=True))
    x = given(LENGTH, WIDTH)
    with torch.no_grad():
        torch.testing.assert_close(same(x), original(x), rtol=1e-5, atol=1e-6)


def test_a_subclass_in_torchs_own_layer_takes_no_fused_path() -> None:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 40, batch_first=True)
    layer.self_attn = Tagged(WIDTH, HEADS, batch_first=True)
    original = enlarge(nn.ModuleList([layer])).eval().requires_grad_(False)
    same, x = copy.deepcopy(original), given(LENGTH, WIDTH)
    use_equivalents(same)
    called: list[Any] = []
    same.get_submodule("0.self_attn.q_proj").register_forward_hook(lambda *seen: called.append(seen))
    with torch.no_grad():
        torch.testing.assert_close(same[0](x), original[0](x), rtol=1e-5, atol=1e-6)
    assert len(called) == 1


def test_heads_of_a_subclass_are_removed_exactly() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Linear(6, WIDTH), nn.Linear(WIDTH, 3)
            self.blocks = nn.ModuleList(OneTensor(batch_first=True) for _ in range(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stem(x)
            for block in self.blocks:
                x = x + block(x, need_weights=False)[0]
            return self.head(x)

    torch.manual_seed(0)
    model: Any = enlarge(Net()).eval().requires_grad_(False)
    use_equivalents(model)
    inputs = {"x": given(LENGTH, 6)}
    structure = verified(model, find_structure(model, inputs=inputs), inputs)
    assert [(group.kind, group.count) for group in structure.groups] == [("heads", HEADS)] * 2
    check_plans(model, structure, inputs)


def test_a_subclass_with_such_layers_of_its_own_stays() -> None:
    class Own(nn.MultiheadAttention):
        def __init__(self) -> None:
            super().__init__(WIDTH, HEADS)
            self.q_proj = nn.Linear(WIDTH, WIDTH)

    module = nn.ModuleList([Own()])
    use_equivalents(module)
    assert type(module[0]) is Own and "in_proj_weight" in module[0]._parameters


@pytest.mark.parametrize("args", [{}, {"norm_first": True}, {"activation": "gelu"}, {"bias": False}])
@pytest.mark.parametrize("batch_first", [True, False])
def test_an_encoder(args: dict[str, Any], batch_first: bool) -> None:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 40, batch_first=batch_first, **args)
    norm = nn.LayerNorm(WIDTH)
    original = enlarge(nn.Sequential(nn.TransformerEncoder(layer, 2, norm, enable_nested_tensor=False))).eval()
    same, x = swapped(original), given(LENGTH, WIDTH, batch_first)
    padding = PADDING[:, :LENGTH]
    for masks in ({}, {"src_key_padding_mask": padding}, {"mask": CAUSAL}, {"mask": CAUSAL, "is_causal": True}):
        with torch.no_grad():
            torch.testing.assert_close(same[0](x, **masks), original[0](x, **masks), rtol=1e-5, atol=1e-6)


def test_tokens_are_those_of_nested_tensors() -> None:
    """torch zeroes the outputs of padding on that path, which depends on the inputs; only there do they differ."""
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 40, batch_first=True)
    original = enlarge(nn.Sequential(nn.TransformerEncoder(layer, 2))).eval()
    padding, x = PADDING[:, :LENGTH], given(LENGTH, WIDTH)
    with torch.no_grad():
        found, expected = (one[0](x, src_key_padding_mask=padding) for one in (swapped(original), original))
    assert expected[padding].abs().max() == 0 < found[padding].abs().max()
    torch.testing.assert_close(found[~padding], expected[~padding], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("batch_first", [True, False])
def test_an_encoder_and_a_decoder(batch_first: bool) -> None:
    torch.manual_seed(0)
    original = nn.Transformer(WIDTH, HEADS, 1, 2, 40, batch_first=batch_first)
    original.encoder.use_nested_tensor = False
    original = enlarge(nn.Sequential(original)).eval()
    source, target = given(SOURCE, WIDTH, batch_first), given(LENGTH, WIDTH, batch_first)
    masks = {"tgt_mask": CAUSAL, "src_key_padding_mask": PADDING, "memory_key_padding_mask": PADDING}
    with torch.no_grad():
        expected = original[0](source, target, **masks)
        torch.testing.assert_close(swapped(original)[0](source, target, **masks), expected, rtol=1e-5, atol=1e-6)


def test_a_module_in_two_places_stays_one() -> None:
    attention = nn.MultiheadAttention(WIDTH, HEADS)
    model = nn.ModuleList([nn.ModuleList([attention, attention]), attention])
    use_equivalents(model)
    assert model[0][0] is model[0][1] is model[1]  # type: ignore[index]
    assert isinstance(model[1], MultiheadAttention)


@pytest.mark.parametrize("folder", ["mask2former", "siglip"])
def test_attention_that_a_family_leaves_whole_stays(folder: str) -> None:
    parent = type("Parent", (nn.Module,), {"__module__": f"transformers.models.{folder}.modeling"})()
    parent.attention = nn.MultiheadAttention(WIDTH, HEADS)
    use_equivalents(nn.Sequential(parent))
    assert type(parent.attention) is nn.MultiheadAttention


class TextModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 40, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        tokens = input_ids.shape[1]
        causal = torch.ones(tokens, tokens, dtype=torch.bool, device=input_ids.device).triu(1)
        hidden = self.encoder(self.embedding(input_ids), causal, attention_mask == 0)
        weights = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * weights).sum(1) / weights.sum(1)


def texts(rows: int, length: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(length)
    lengths = torch.randint(1, length + 1, (rows, 1), generator=generator)
    mask = (torch.arange(length) < lengths).long()
    return {"input_ids": torch.randint(50, (rows, length), generator=generator), "attention_mask": mask}


def onnx_outputs(model: nn.Module, path: Path, example: dict[str, torch.Tensor], axes: Any, inputs: Any) -> list[Any]:
    import onnxruntime

    with torch.no_grad():
        program = torch.onnx.export(
            model, (), kwargs=example, input_names=list(example), dynamic_shapes=axes, dynamo=True, verbose=False
        )
    assert program is not None
    program.save(path)
    session = onnxruntime.InferenceSession(path)
    return [session.run(None, {name: value.numpy() for name, value in one.items()})[0] for one in inputs]


def test_a_text_model_is_exported_with_batches_and_lengths_that_vary(tmp_path: Path) -> None:
    original = enlarge(TextModel()).eval()
    same = swapped(original)
    batch, length = torch.export.Dim("batch", min=1, max=8), torch.export.Dim("sequence", min=2, max=16)
    axes = {name: {0: batch, 1: length} for name in ("input_ids", "attention_mask")}
    inputs = [texts(rows, tokens) for rows in (1, 2, 5) for tokens in (4, 9)]
    for found, one in zip(onnx_outputs(same, tmp_path / "a.onnx", texts(2, 6), axes, inputs), inputs, strict=True):
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(found), original(**one), rtol=1e-5, atol=1e-5)


def test_a_vision_transformer_of_torchvision_is_exported_with_batches_that_vary(tmp_path: Path) -> None:
    from torchvision.models import VisionTransformer

    original = enlarge(VisionTransformer(32, 8, 2, HEADS, WIDTH, 40, num_classes=5)).eval()
    axes = {"x": {0: torch.export.Dim("batch", min=1, max=8)}}
    inputs = [{"x": torch.randn(rows, 3, 32, 32)} for rows in (1, 2, 5)]
    found = onnx_outputs(swapped(original), tmp_path / "a.onnx", inputs[1], axes, inputs)
    for one, images in zip(found, inputs, strict=True):
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(one), original(**images), rtol=1e-5, atol=1e-5)
