"""Mixtures of experts: the graph computes what transformers computes, for tokens that choose other experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
import transformers

from optin_export.export import export_onnx, export_program
from optin_export.models import wrap
from tests.conftest import enlarge

SIZES: dict[str, Any] = {
    **{"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32},
}
MIXTURES = {
    "MixtralForCausalLM": {**SIZES, "num_local_experts": 4},
    "Qwen2MoeForCausalLM": {**SIZES, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
}


@pytest.mark.parametrize("name", MIXTURES)
def test_the_graph_of_a_mixture(name: str, tmp_path: Path) -> None:
    model_class = getattr(transformers, name)
    original = enlarge(model_class(model_class.config_class(**MIXTURES[name]))).eval()
    before = original.get_experts_implementation()
    ids, others = (
        torch.randint(5, 40, shape, generator=torch.Generator().manual_seed(1)) for shape in ((2, 6), (3, 9))
    )
    with torch.no_grad():
        wanted = original(others, use_cache=False).logits
    model = wrap(original, "text-generation")
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    export_onnx(model, given, tmp_path / "a.onnx", max_batch=8, sequence=16)
    session = onnxruntime.InferenceSession(str(tmp_path / "a.onnx"), providers=["CPUExecutionProvider"])
    fed = {"input_ids": others.numpy(), "attention_mask": torch.ones_like(others).numpy()}
    [logits] = session.run(None, {one.name: fed[one.name] for one in session.get_inputs()})
    torch.testing.assert_close(torch.from_numpy(logits), wanted, rtol=1e-4, atol=1e-5)
    assert original.get_experts_implementation() == before

    export_program(model, given, tmp_path / "a.pt2", max_batch=8, sequence=16)
    program = torch.export.load(tmp_path / "a.pt2").module()
    inputs = {"input_ids": others, "attention_mask": torch.ones_like(others)}
    torch.testing.assert_close(program(**inputs), wanted, rtol=1e-4, atol=1e-5)
