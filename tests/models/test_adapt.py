"""Models that are not plain float32 weights on the CPU: made so, or refused with one clear error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from optin_export.errors import InputError
from optin_export.models.adapt import checked, readable
from optin_export.models.loading import build, load_model
from optin_export.recipe import ModelSection
from tests.units.builders import TEXT, from_transformers

TASK = "text-classification"


def small(class_name: str = "BertForSequenceClassification", **config: Any) -> nn.Module:
    import transformers

    architecture = from_transformers(class_name, **TEXT, **config)()
    model_class = getattr(transformers, class_name)
    torch.manual_seed(0)
    return model_class(model_class.config_class.from_dict(architecture["config"])).eval()


def refused(module: nn.Module) -> InputError:
    with pytest.raises(InputError) as caught:
        checked(module, "py:model.py:make")
    assert str(caught.value).count("\n") == 2
    return caught.value


def section(source: Path | str, **fields: Any) -> ModelSection:
    return ModelSection(source=str(source), task=TASK, **fields)


def test_a_plain_model_is_left_as_it_is() -> None:
    model = small()
    names = list(model.state_dict())
    assert checked(model, "x") is model
    readable(model)
    assert list(model.state_dict()) == names


def test_compiled_modules_are_unwrapped(tmp_path: Path) -> None:
    """Around the whole, around a part, and compiled in place."""
    model, ids = small(), torch.arange(6, 18).view(2, 6)
    expected = model(input_ids=ids).logits
    names = list(model.state_dict())
    model.bert.encoder.layer[1] = torch.compile(model.bert.encoder.layer[1], backend="eager")  # type: ignore[index,union-attr]
    model.bert.embeddings.compile(backend="eager")  # type: ignore[union-attr,operator]
    plain = checked(torch.compile(model, backend="eager"), "x")  # type: ignore[arg-type]
    assert type(plain).__name__ == "BertForSequenceClassification"
    assert list(plain.state_dict()) == names
    assert all(part._compiled_call_impl is None for part in plain.modules())
    torch.testing.assert_close(plain(input_ids=ids).logits, expected, rtol=0, atol=0)


def test_a_checkpoint_of_a_compiled_model_fits(bert_folder: Path, tmp_path: Path) -> None:
    import transformers

    model = transformers.AutoModelForSequenceClassification.from_pretrained(bert_folder)
    torch.save({f"_orig_mod.{name}": tensor for name, tensor in model.state_dict().items()}, tmp_path / "compiled.pt")
    loaded = load_model(section(bert_folder, weights=str(tmp_path / "compiled.pt"))).model
    assert torch.equal(loaded.model.classifier.weight, model.classifier.weight)  # type: ignore[union-attr]


class _Adapter(nn.Module):
    """As PEFT wraps a layer."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = layer
        self.lora_A = nn.ModuleDict({"default": nn.Linear(layer.in_features, 2, bias=False)})


def test_adapters_have_to_be_merged(tmp_path: Path) -> None:
    model = small()
    query = model.bert.encoder.layer[0].attention.self  # type: ignore[index,union-attr]
    query.query = _Adapter(query.query)  # type: ignore[arg-type]
    error = refused(model)
    assert "layer.0.attention.self.query" in error.why and "merge_and_unload" in error.fix
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="PEFT adapter") as caught:
        load_model(section(tmp_path))
    assert "merge_and_unload" in caught.value.fix


def test_quantised_weights_are_refused() -> None:
    eights = small()
    layer = eights.bert.encoder.layer[0].output.dense  # type: ignore[index,union-attr]
    layer.weight = nn.Parameter(torch.zeros(32, 64, dtype=torch.int8), requires_grad=False)
    assert "quantised" in refused(eights).what and "int8" in refused(eights).why
    floats = small()
    layer = floats.bert.encoder.layer[0].output.dense  # type: ignore[index,union-attr]
    layer.weight = nn.Parameter(torch.zeros(32, 64).to(torch.float8_e4m3fn), requires_grad=False)
    assert "float8" in refused(floats).why
    dynamic = torch.ao.quantization.quantize_dynamic(small(), {nn.Linear}, dtype=torch.qint8)
    assert "quantised" in refused(dynamic).what


class _Packed(torch.Tensor):
    """A tensor subclass that stands for others, as torchao's do."""


def test_weights_of_a_subclass_are_refused() -> None:
    model = small()
    layer = model.bert.encoder.layer[0].output.dense  # type: ignore[index,union-attr]
    layer.weight = nn.Parameter(torch.zeros(32, 64).as_subclass(_Packed), requires_grad=False)
    assert "_Packed" in refused(model).why


def test_a_quantised_checkpoint_is_named_before_its_library_is_asked_for(tmp_path: Path) -> None:
    small().save_pretrained(tmp_path)  # type: ignore[operator]
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="quantised") as caught:
        load_model(section(tmp_path))
    assert "bitsandbytes" in caught.value.why


def test_weights_that_were_never_loaded_are_refused() -> None:
    with torch.device("meta"):
        model = small()
    assert "meta device" in refused(model).why


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_precision_becomes_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    model = small().to(dtype)
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    loaded = load_model(section(tmp_path))
    for one in (loaded.model, build(loaded.architecture)):
        assert {tensor.dtype for tensor in one.parameters()} == {torch.float32}
    weight = loaded.model.model.classifier.weight  # type: ignore[union-attr]
    assert torch.equal(weight, model.classifier.weight.float())  # type: ignore[union-attr,arg-type,operator]


def test_gpt2_is_made_of_linear_layers_and_computes_the_same() -> None:
    model, ids = small("GPT2LMHeadModel", n_inner=64), torch.arange(6, 18).view(2, 6)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        readable(model)
        got = model(input_ids=ids).logits
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert not [part for part in model.modules() if type(part).__name__ == "Conv1D"]
    assert model.lm_head.weight is model.transformer.wte.weight  # type: ignore[union-attr]
    assert model.config.use_cache is False  # type: ignore[union-attr]


def test_mpnet_computes_the_same_with_its_heads_numbered() -> None:
    model, ids = small("MPNetModel"), torch.arange(6, 18).view(2, 6)
    with torch.no_grad():
        expected = model(input_ids=ids).last_hidden_state
        readable(model)
        got = model(input_ids=ids).last_hidden_state
    assert torch.equal(got, expected)
    assert model.encoder.layer[0].attention.attn.heads.tolist() == [0, 1, 2, 3]  # type: ignore[index,union-attr]
