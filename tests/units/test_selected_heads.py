"""Attention that reads biases of all heads as an argument: it takes those of its own heads, and nobody's are cut."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from optin_export.engines import build as build_engine
from optin_export.engines import load
from optin_export.export import export_onnx
from optin_export.models import build
from optin_export.models.adapt import readable
from optin_export.models.tasks import TaskModel
from optin_export.pruning import load_model, save_model, verified
from optin_export.pruning.rebuild import rebuild
from optin_export.recipe import Target
from optin_export.repair import RepairSettings, apply_plan, masked_difference
from optin_export.units import Structure, UnitGroup, arguments_by_head, find_structure, select_heads
from tests.conftest import enlarge
from tests.repair.plans import halved
from tests.units.builders import from_transformers
from tests.units.models import batches_for, inputs_for

T5 = {"vocab_size": 64, "d_ff": 64, "d_kv": 8}
#: Blocks of four tokens.
LONG = {**T5, "local_radius": 3, "global_block_size": 4}
#: model -> (class, settings, the arguments by head, the module of the first block that takes them).
NETS: dict[str, tuple[str, dict[str, Any], tuple[str, ...], str]] = {
    "t5": ("T5EncoderModel", T5, ("position_bias",), "model.encoder.block.0.layer.0.SelfAttention"),
    "mt5": ("MT5EncoderModel", T5, ("position_bias",), "model.encoder.block.0.layer.0.SelfAttention"),
    "longt5": ("LongT5EncoderModel", LONG, ("position_bias",), "model.encoder.block.0.layer.0.LocalSelfAttention"),
    "longt5-global": (
        "LongT5EncoderModel",
        {**LONG, "encoder_attention_type": "transient-global"},
        ("position_bias",),
        "model.encoder.block.0.layer.0.TransientGlobalSelfAttention",
    ),
    "bloom": ("BloomModel", {"vocab_size": 64}, ("alibi",), "model.h.0.self_attention"),
    "falcon": (
        "FalconModel",
        {"vocab_size": 64, "alibi": True, "multi_query": False},
        ("alibi", "attention_mask"),
        "model.h.0.self_attention",
    ),
}


def built(name: str) -> tuple[TaskModel, dict[str, Any], Structure]:
    kind, settings, _, _ = NETS[name]
    describe = from_transformers(kind, **settings)
    architecture = {**describe(), "task": "feature-extraction", "pooling": "mean", "normalize": False}
    model = build(architecture)
    enlarge(model, 0)
    inputs = inputs_for(model, 2, 0)
    return model, architecture, verified(model, find_structure(model, inputs=inputs), inputs)


def heads_of(structure: Structure) -> list[UnitGroup]:
    return [group for group in structure.groups if group.kind == "heads"]


@pytest.mark.parametrize("name", NETS)
def test_every_block_loses_its_own_heads_exactly(name: str, tmp_path: Path) -> None:
    model, architecture, structure = built(name)
    _, _, arguments, path = NETS[name]
    assert [group.count for group in heads_of(structure)] == [4, 4, 4]
    assert heads_of(structure)[0].selects == (path, arguments)
    plan, inputs = halved(structure), inputs_for(model, 3, 1)
    kept = [plan.groups[group.key].kept for group in heads_of(structure)]
    assert len(set(kept)) > 1, "the blocks keep different heads"
    plain = apply_plan(model, structure, plan, (), inputs, RepairSettings(repair=False)).dense
    sizes = (1, 2, 5)
    assert max(masked_difference(model, plain, structure, plan, inputs_for(model, size, size)) for size in sizes) < 1e-5
    smaller, _ = rebuild(model, structure, plan.groups, inputs)
    tables = {name: one.shape for name, one in model.state_dict().items() if "relative_attention_bias" in name}
    assert tables == {name: one.shape for name, one in smaller.state_dict().items() if name in tables}
    repaired = apply_plan(model, structure, plan, batches_for(model, 3), inputs, RepairSettings()).dense
    save_model(tmp_path, repaired, architecture, structure, plan, inputs)
    for other in (copy.deepcopy(repaired), load_model(tmp_path)):
        assert torch.equal(other(**inputs), repaired(**inputs))


@pytest.mark.parametrize("kind", ["local", "transient-global"])
def test_longt5_computes_what_the_library_does(kind: str) -> None:
    sizes = {"d_model": 32, "num_layers": 2, "num_heads": 4, **LONG, "encoder_attention_type": kind}
    model = enlarge(transformers.LongT5EncoderModel(transformers.LongT5Config(**sizes))).eval()
    same = copy.deepcopy(model)
    readable(same)
    ids = torch.randint(1, 64, (2, 14), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    for given in ({"input_ids": ids, "attention_mask": mask}, {"input_ids": ids[:, :8]}):
        with torch.no_grad():
            wanted, found = model(**given).last_hidden_state, same(**given).last_hidden_state
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["t5", "bloom"])
def test_the_exported_file_selects_at_every_batch(name: str, tmp_path: Path) -> None:
    model, _, structure = built(name)
    dense = apply_plan(
        model, structure, halved(structure), (), inputs_for(model, 2, 0), RepairSettings(repair=False)
    ).dense
    export_onnx(dense, inputs_for(model, 2, 0), tmp_path / "model.onnx", max_batch=8, sequence=16)
    build_engine(tmp_path / "model.onnx", Target(), tmp_path / "engine.onnx")
    engine = load(tmp_path / "engine.onnx", Target())
    for batch in (1, 2, 5):
        inputs = inputs_for(model, batch, batch)
        got = engine.run({name: tensor.numpy() for name, tensor in inputs.items()})[dense.output_name]
        torch.testing.assert_close(torch.from_numpy(got), dense(**inputs), rtol=1e-3, atol=1e-4)


def test_a_table_of_one_block_alone_is_cut_with_its_heads() -> None:
    describe = from_transformers("UMT5EncoderModel", **T5)
    model = build({**describe(), "task": "feature-extraction", "pooling": "mean", "normalize": False})
    enlarge(model, 0)
    inputs = inputs_for(model, 2, 0)
    structure = verified(model, find_structure(model, inputs=inputs), inputs)
    assert all(group.selects is None and len(group.tables) == 1 for group in heads_of(structure))
    plan = halved(structure)
    dense = apply_plan(model, structure, plan, (), inputs, RepairSettings(repair=False)).dense
    for group in heads_of(structure):
        (table,) = group.tables
        whole, cut = (dict(one.named_parameters())[table.path] for one in (model, dense))
        assert torch.equal(cut, whole[:, list(plan.groups[group.key].kept)])


class Attention(nn.Module):
    """Returns what it is given."""

    def forward(self, states: torch.Tensor, bias: torch.Tensor, slopes: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return bias * 1, slopes * 1, bias, states


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()

    def forward(self, states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        batch, tokens = states.shape[:2]
        bias = torch.arange(4.0)[None, :, None, None].expand(1, 4, tokens, tokens)
        slopes = torch.arange(4.0)[None, :, None].expand(batch, 4, tokens).reshape(batch * 4, 1, tokens)
        output: tuple[torch.Tensor, ...] = self.attention(states, bias, slopes=slopes)
        return output


def test_heads_are_selected_twice_and_the_whole_argument_is_passed_on() -> None:
    model = Blocks()
    states = torch.randn(3, 4, 7)
    found = arguments_by_head(model, "attention", 4, [{"states": states}, {"states": states[:1, :2]}])
    assert found == ("1", "slopes"), "not the states, although 4 tokens are as many as there are heads"
    group = UnitGroup(0, "heads", 4, 2, (), "", None, None, selects=("attention", found))
    select_heads(model, group, [1])
    select_heads(model, group, [0])  # of the three that are left: 0, 2, 3
    bias, slopes, passed, unchanged = model(states=states)
    assert bias[0, :, 0, 0].tolist() == [2, 3]
    assert slopes[:, 0, 0].tolist() == [2, 3] * 3
    assert passed.shape == (1, 4, 4, 4) and torch.equal(unchanged, states)
