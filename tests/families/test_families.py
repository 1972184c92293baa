"""Every family through one path: score -> plan -> masked equals dense -> repair -> save and rebuild -> ONNX parity."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from optin_export.engines import build, load
from optin_export.errors import InputError
from optin_export.export import export_onnx
from optin_export.families import Structure, count_macs, count_params, find_structure, measure_costs, supported
from optin_export.recipe import Budget, PruneSection, Target
from optin_export.scoring import score
from optin_export.search import Plan, find_plan
from optin_export.sources import Batch
from optin_export.sources.tasks import TaskModel, wrap
from optin_export.surgery import load_model, operate, save_model
from tests.conftest import VIT_ARGS, enlarge

SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}


def transformers_model(name: str, **config: Any) -> Callable[[], tuple[torch.nn.Module, dict[str, Any]]]:
    def make() -> tuple[torch.nn.Module, dict[str, Any]]:
        import transformers

        model_class = getattr(transformers, name)
        model = model_class(model_class.config_class(**SMALL, **config, attn_implementation="eager"))
        architecture = {"library": "transformers", "class": name, "config": model.config.to_dict()}
        return model, architecture

    return make


def timm_model(name: str, **args: Any) -> Callable[[], tuple[torch.nn.Module, dict[str, Any]]]:
    def make() -> tuple[torch.nn.Module, dict[str, Any]]:
        import timm

        arguments = {**VIT_ARGS, **args}
        model = timm.create_model(name, pretrained=False, **arguments)
        return model, {"library": "timm", "name": name, "args": arguments}

    return make


TEXT = {"vocab_size": 64, "max_position_embeddings": 40}
IMAGE = {"image_size": 32, "patch_size": 8, "num_channels": 1}
MODELS: dict[str, tuple[str, str, Callable[[], tuple[torch.nn.Module, dict[str, Any]]]]] = {
    "bert": ("bert", "text-classification", transformers_model("BertForSequenceClassification", **TEXT)),
    "bert-embedding": ("bert", "feature-extraction", transformers_model("BertModel", **TEXT)),
    "bert-regression": (
        "bert",
        "text-classification",
        transformers_model("BertForSequenceClassification", **TEXT, num_labels=1),
    ),
    "roberta": ("bert", "text-classification", transformers_model("RobertaForSequenceClassification", **TEXT)),
    "electra": (
        "bert",
        "text-classification",
        transformers_model("ElectraForSequenceClassification", **TEXT, embedding_size=32),
    ),
    "vit": ("vit", "image-classification", timm_model("vit_tiny_patch16_224")),
    "vit-no-qkv-bias": ("vit", "image-classification", timm_model("vit_tiny_patch16_224", qkv_bias=False)),
    "vit-qk-norm": ("vit", "image-classification", timm_model("vit_tiny_patch16_224", qk_norm=True)),
    "deit3-layer-scale": ("vit", "image-classification", timm_model("deit3_small_patch16_224", init_values=0.1)),
    "deit-distilled": ("vit", "image-classification", timm_model("deit_tiny_distilled_patch16_224")),
    "vit-transformers": (
        "vit-transformers",
        "image-classification",
        transformers_model("ViTForImageClassification", **IMAGE),
    ),
    "deit-transformers": (
        "vit-transformers",
        "image-classification",
        transformers_model("DeiTForImageClassification", **IMAGE),
    ),
}


def inputs_for(task: str, batch: int, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    if task == "image-classification":
        return {"pixel_values": torch.randn(batch, 1, 32, 32, generator=generator)}
    lengths = torch.randint(6, 13, (batch,), generator=generator)
    lengths[0] = 12
    mask = (torch.arange(12)[None] < lengths[:, None]).long()
    tokens = torch.randint(5, 64, (batch, 12), generator=generator)
    return {"input_ids": torch.where(mask.bool(), tokens, 1), "attention_mask": mask}


class Case:
    """One model taken once through scoring, search, surgery and export."""

    def __init__(self, name: str, folder: Path) -> None:
        self.family, task, make = MODELS[name]
        self.folder, self.task = folder, task
        module, architecture = make()
        self.model: TaskModel = wrap(enlarge(module), task, "mean" if task == "feature-extraction" else None, False)
        for part in self.model.modules():
            if "fused_attn" in vars(part):
                vars(part)["fused_attn"] = False
        self.architecture = {
            **architecture,
            "task": task,
            "pooling": self.model.__dict__.get("pooling"),
            "normalize": False,
        }
        self.structure: Structure = find_structure(self.model)
        self.batches = [Batch(inputs_for(task, 6, seed), np.arange(6)) for seed in (1, 2, 3, 4)]
        config = PruneSection(budget=Budget(macs=0.5), probes=10, rows=48)
        self.scores = score(self.model, self.structure, self.batches[:2], config, seed=0)
        self.costs = measure_costs(self.model, self.structure, inputs_for(task, 1, 0))
        align = {group.key: 1 if group.kind == "heads" else 8 for group in self.structure.groups}
        self.plan: Plan = find_plan(self.scores.values, self.costs, config.budget, align)
        inputs = inputs_for(task, 3, 5)
        self.plain = operate(self.model, self.structure, self.plan, (), inputs, repair=False)
        self.repaired = operate(self.model, self.structure, self.plan, self.batches, inputs, repair=True)
        save_model(folder, self.repaired.dense, self.architecture, self.family, self.plan, inputs)


@pytest.fixture(scope="module", params=list(MODELS))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(request.param, tmp_path_factory.mktemp(request.param))


def output(model: TaskModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs)


def test_family_and_units(case: Case) -> None:
    assert case.structure.family == case.family
    assert len(case.structure.blocks) == 3
    assert [group.kind for group in case.structure.groups] == ["heads", "neurons"] * 3
    assert {group.count for group in case.structure.groups if group.kind == "heads"} == {4}


def test_scores_cover_every_unit(case: Case) -> None:
    for group in case.structure.groups:
        values = case.scores.values[group.key]
        assert values.shape == (group.count,)
        assert (values > 0).all()


def test_masked_model_equals_dense_model(case: Case) -> None:
    assert case.plain.masked_difference <= 1e-5


def test_masked_equals_dense_when_every_group_loses_some_units(case: Case) -> None:
    """Whatever the search chose: the first unit of every group goes, and every third after it."""
    groups = {
        key: plan.model_copy(update={"kept": tuple(unit for unit in range(plan.count) if unit % 3)})
        for key, plan in case.plan.groups.items()
    }
    plan = case.plan.model_copy(update={"groups": groups})
    operation = operate(case.model, case.structure, plan, (), inputs_for(case.task, 3, 7), repair=False)
    assert operation.masked_difference <= 1e-5


def test_costs_predict_the_dense_model(case: Case) -> None:
    one = inputs_for(case.task, 1, 0)
    assert count_macs(case.plain.dense, one) == case.plan.predicted.macs <= 0.5 * case.costs.macs
    dropped = [group for group in case.structure.groups if not case.plan.groups[group.key].kept]
    if not dropped:  # a dropped sub-layer also loses its norm and biases, which no unit accounts for
        assert count_params(case.plain.dense) == case.plan.predicted.params


def test_repair_lowers_the_error(case: Case) -> None:
    for key, repair in case.repaired.repairs.items():
        assert repair.after <= repair.before * 1.001 + 1e-12, key
    data = inputs_for(case.task, 6, 1)
    reference = output(case.model, data)
    errors = [
        float((output(model, data) - reference).square().sum()) for model in (case.plain.dense, case.repaired.dense)
    ]
    assert errors[1] < errors[0]


def test_saved_model_is_rebuilt_exactly(case: Case) -> None:
    data = inputs_for(case.task, 3, 9)
    assert torch.equal(output(load_model(case.folder), data), output(case.repaired.dense, data))


def test_onnx_reproduces_the_model(case: Case) -> None:
    pytest.importorskip("onnxruntime")
    path = case.folder / "pruned.onnx"
    sequence = 16 if case.task != "image-classification" else None
    export_onnx(case.repaired.dense, inputs_for(case.task, 2, 5), path, max_batch=8, sequence=sequence)
    target = Target()
    build(path, target, case.folder / "engine.onnx")
    engine = load(case.folder / "engine.onnx", target)
    for batch in (1, 5):
        for identical in (False, True):
            data = inputs_for(case.task, batch, 11)
            if identical:
                data = {name: tensor[:1].expand(batch, *tensor.shape[1:]).contiguous() for name, tensor in data.items()}
            got = engine.run({name: tensor.numpy() for name, tensor in data.items()})[case.model.output_name]
            np.testing.assert_allclose(got, output(case.repaired.dense, data).numpy(), atol=1e-4, rtol=1e-4)
            if identical:
                np.testing.assert_allclose(got, np.broadcast_to(got[:1], got.shape), atol=1e-6)


@pytest.mark.parametrize("name", ["bert", "vit", "deit3-layer-scale", "vit-transformers"])
def test_whole_sub_layers_may_vanish(name: str, tmp_path: Path) -> None:
    """Drop the heads of one block and the neurons of another: masked equals dense, repair works, ONNX has no trace."""
    case = Case(name, tmp_path)
    groups = {key: plan.model_copy(update={"kept": ()}) for key, plan in case.plan.groups.items()}
    keep = dict(case.plan.groups) | {key: groups[key] for key in ("block00.heads", "block01.neurons")}
    plan = case.plan.model_copy(update={"groups": keep})
    inputs = inputs_for(case.task, 3, 5)
    plain = operate(case.model, case.structure, plan, (), inputs, repair=False)
    assert plain.masked_difference <= 1e-5
    repaired = operate(case.model, case.structure, plan, case.batches, inputs, repair=True)
    assert repaired.repairs["block00.heads"].after < repaired.repairs["block00.heads"].before
    save_model(tmp_path, repaired.dense, case.architecture, case.family, plan, inputs)
    data = inputs_for(case.task, 4, 8)
    assert torch.equal(output(load_model(tmp_path), data), output(repaired.dense, data))
    sequence = 16 if case.task != "image-classification" else None
    export_onnx(repaired.dense, inputs, tmp_path / "pruned.onnx", max_batch=4, sequence=sequence)
    build(tmp_path / "pruned.onnx", Target(), tmp_path / "engine.onnx")
    engine = load(tmp_path / "engine.onnx", Target())
    got = engine.run({name: tensor.numpy() for name, tensor in data.items()})[case.model.output_name]
    np.testing.assert_allclose(got, output(repaired.dense, data).numpy(), atol=1e-4, rtol=1e-4)


def test_every_family_is_tested() -> None:
    assert {family.name for family in supported()} == {family for family, _, _ in MODELS.values()}


def test_unsupported_architecture_names_the_supported_ones() -> None:
    with pytest.raises(InputError) as error:
        find_structure(torch.nn.Sequential(torch.nn.Linear(2, 2)))
    assert "Sequential" in error.value.what
    assert all(family.name in error.value.why for family in supported())
    assert "families" in error.value.fix


def test_a_variant_the_family_cannot_prune_is_refused() -> None:
    import timm

    model = timm.create_model("vit_tiny_patch16_224", pretrained=False, **VIT_ARGS)
    model.blocks[1].attn.norm = torch.nn.LayerNorm(32)
    with pytest.raises(InputError, match=r"blocks\.1\.attn"):
        find_structure(model)
