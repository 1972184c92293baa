"""Models with two towers, neither CLIP nor SigLIP: features as their own library computes them, or a refusal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from optin_export.errors import InputError
from optin_export.models.loading import LoadedModel, build, load_model
from optin_export.recipe import ModelSection
from tests.conftest import enlarge

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {**SIZES, "vocab_size": 60, "max_position_embeddings": 16, "bos_token_id": 1, "eos_token_id": 2}
IMAGE = {**SIZES, "image_size": 32, "patch_size": 16}
NAMES = ("MetaClip2Model", "OwlViTModel", "CLIPSegModel", "ChineseCLIPModel")


def saved(name: str, folder: Path) -> Any:
    model_class = getattr(transformers, name)
    config = model_class.config_class(text_config=TEXT, vision_config=IMAGE, projection_dim=16)
    torch.manual_seed(0)
    model = enlarge(model_class(config)).eval()
    model.save_pretrained(folder)
    return model


def load(folder: Path, task: str) -> LoadedModel:
    return load_model(ModelSection(source=str(folder), task=task))  # type: ignore[arg-type]


def features(output: Any) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output.pooler_output


@pytest.mark.parametrize("name", NAMES)
def test_image_features(name: str, tmp_path: Path) -> None:
    original, image = saved(name, tmp_path), torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    loaded = load(tmp_path, "image-feature-extraction")
    with torch.no_grad():
        wanted, given = features(original.get_image_features(pixel_values=image)), loaded.model(pixel_values=image)
    assert wanted.std() > 1e-3
    torch.testing.assert_close(given, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))
    rebuilt = build(loaded.architecture)
    assert rebuilt.state_dict().keys() == loaded.model.state_dict().keys()


@pytest.mark.parametrize("name", NAMES[:3])
def test_text_features(name: str, tmp_path: Path) -> None:
    original, ids = saved(name, tmp_path), torch.randint(4, 60, (2, 8), generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[1] * 8, [1] * 5 + [0] * 3])
    loaded = load(tmp_path, "feature-extraction")
    with torch.no_grad():
        wanted = features(original.get_text_features(input_ids=ids, attention_mask=mask))
        given = loaded.model(input_ids=ids, attention_mask=mask)
    torch.testing.assert_close(given, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


def test_a_tower_that_computes_its_features_in_another_way_is_refused(tmp_path: Path) -> None:
    saved("ChineseCLIPModel", tmp_path)
    with pytest.raises(InputError, match="the text tower of this ChineseCLIPModel cannot be used"):
        load(tmp_path, "feature-extraction")
