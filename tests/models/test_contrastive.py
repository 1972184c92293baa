"""CLIP and SigLIP: one tower is left, it gives what transformers gives, and classes are a layer of the model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from optin_export.data import load_sources
from optin_export.data.batches import TextProcessor
from optin_export.errors import InputError
from optin_export.models.loading import LoadedModel, load_model
from optin_export.recipe import ModelSection, validate
from optin_export.units import count_params, find_structure
from tests.conftest import VIT_ARGS, Make

NAMES = ["man", "dogs", "green grass", "old house"]
ZERO_SHOT, TEXTS, IMAGES = "zero-shot-image-classification", "feature-extraction", "image-feature-extraction"


@pytest.fixture(params=["clip", "siglip"])
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(f"{request.param}_folder")


def load(folder: Path, task: str, **fields: Any) -> LoadedModel:
    if task == ZERO_SHOT:
        fields.setdefault("classes", NAMES)
    return load_model(ModelSection(source=str(folder), task=task, **fields))  # type: ignore[arg-type]


def whole(folder: Path) -> Any:
    import transformers

    return transformers.AutoModel.from_pretrained(folder, attn_implementation="eager").eval()


def tokens(folder: Path, texts: list[str]) -> torch.Tensor:
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return tokenizer(texts, padding="max_length", max_length=16, return_tensors="pt")["input_ids"]


def pixels(count: int) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_logits_are_those_of_both_towers(folder: Path) -> None:
    loaded = load(folder, ZERO_SHOT, prompt="a {} near")
    images, texts = pixels(3), tokens(folder, [f"a {name} near" for name in NAMES])
    wanted = whole(folder)(input_ids=texts, pixel_values=images).logits_per_image
    got = loaded.model(pixel_values=images)
    assert got.shape == (3, 4) and got.std() > 1e-3
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)
    assert loaded.labels == {name: index for index, name in enumerate(NAMES)}


@torch.no_grad()
def test_several_prompts_are_averaged(folder: Path) -> None:
    prompts = ["a {}", "some old {} by night"]
    model, images = whole(folder), pixels(2)
    embeddings = torch.stack(
        [
            F.normalize(model.get_text_features(tokens(folder, [p.replace("{}", n) for n in NAMES])).pooler_output)
            for p in prompts
        ]
    )
    image = F.normalize(model.get_image_features(images).pooler_output)
    wanted = model.logit_scale.exp() * image @ F.normalize(embeddings.mean(0)).T + getattr(model, "logit_bias", 0.0)
    got = load(folder, ZERO_SHOT, prompt=prompts).model(pixel_values=images)
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_embeddings_are_those_of_transformers(folder: Path) -> None:
    texts = tokens(folder, ["a man is playing", "two dogs run over green grass near the house"])
    text = load(folder, TEXTS)
    mask = {"attention_mask": (texts != 0).long()} if text.model.reads_mask else {}  # type: ignore[union-attr]
    wanted = whole(folder).get_text_features(texts).pooler_output
    torch.testing.assert_close(text.model(input_ids=texts, **mask), wanted, atol=1e-5, rtol=1e-5)
    image = load(folder, IMAGES, normalize=True)
    wanted = F.normalize(whole(folder).get_image_features(pixels(2)).pooler_output)
    torch.testing.assert_close(image.model(pixel_values=pixels(2)), wanted, atol=1e-5, rtol=1e-5)
    assert (text.model.output_name, image.model.output_name) == ("sentence_embedding", "image_embedding")
    assert text.model.output_kind == image.model.output_kind == "embedding"


@torch.no_grad()
def test_a_text_embedding_does_not_depend_on_the_padding(folder: Path) -> None:
    """SigLIP reads the last position, whatever stands there: without padding of its own this fails."""
    texts = tokens(folder, ["a man is playing"])
    model = load(folder, TEXTS).model
    results = []
    for length in (8, 12, 16):
        inputs = {"input_ids": texts[:, :length], "attention_mask": (texts[:, :length] != 0).long()}
        names = inputs if model.reads_mask else ["input_ids"]  # type: ignore[union-attr]
        results.append(model(**{name: inputs[name] for name in names}))
    torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(results[0], results[2], atol=1e-5, rtol=1e-5)


def test_only_one_tower_is_left(folder: Path) -> None:
    both = whole(folder)
    for task, blocks, tower in ((ZERO_SHOT, 3, "vision"), (IMAGES, 3, "vision"), (TEXTS, 2, "text")):
        model = load(folder, task).model
        structure = find_structure(model)
        assert (structure.family, len(structure.blocks)) == ("clip", blocks)
        kept = count_params(getattr(both, f"{tower}_model"))
        head = sum(p.numel() for name, p in model.named_parameters() if "projection" in name or "head" in name)
        assert kept <= count_params(model) <= kept + head


def test_class_names_come_from_a_file_too(clip_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("man\n\n dogs \n", encoding="utf-8")
    assert load(clip_folder, ZERO_SHOT, classes=str(tmp_path / "classes.txt")).labels == {"man": 0, "dogs": 1}
    for content, says in (("", "has none"), ("man\nman\n", "'man' is there twice")):
        (tmp_path / "classes.txt").write_text(content, encoding="utf-8")
        with pytest.raises(InputError, match=says):
            load(clip_folder, ZERO_SHOT, classes=str(tmp_path / "classes.txt"))
    with pytest.raises(InputError, match="cannot read the class names"):
        load(clip_folder, ZERO_SHOT, classes=str(tmp_path / "none.txt"))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"classes": []}, "at least one class"),
        ({"classes": ["cat", "dog", "cat"]}, "names 'cat' twice"),
        ({"classes": ["cat", False]}, "list of class names"),
        ({"classes": ["cat", " "]}, "list of class names"),
        ({"classes": None}, "model.classes is needed"),
        ({"prompt": "a photo"}, "one {} where the class name goes"),
        ({"prompt": ["a {}", "{} and {}"]}, "one {} where the class name goes"),
        ({"prompt": []}, "a prompt, or a list of them"),
        ({"task": "image-classification"}, "are only for the task zero-shot-image-classification"),
        ({"task": IMAGES, "classes": None}, "there is no metric for image-feature-extraction"),
    ],
)
def test_a_bad_recipe(zero_shot_recipe: Make, fields: dict[str, Any], says: str) -> None:
    recipe = zero_shot_recipe()
    recipe["model"] |= fields
    with pytest.raises(InputError) as caught:
        validate(recipe, Path("/"))
    assert says in caught.value.why and str(caught.value).count("\n") == 2


def test_models_without_the_tower_are_refused(clip_folder: Path, bert_folder: Path, tmp_path: Path) -> None:
    import transformers

    with pytest.raises(InputError, match="zero-shot-image-classification"):
        load(bert_folder, ZERO_SHOT)
    with pytest.raises(InputError, match="image-feature-extraction"):
        load(bert_folder, IMAGES)
    with pytest.raises(InputError, match="cannot be used for zero-shot"):
        load_model(ModelSection(source="timm:vit_tiny_patch16_224", task=ZERO_SHOT, args=VIT_ARGS, weights="random"))
    with pytest.raises(InputError, match="towers have their own pooling"):
        load(clip_folder, TEXTS, pooling="mean")
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.Siglip2Config(text_config={**small, "vocab_size": 32}, vision_config=small)
    transformers.Siglip2Model(config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="image tower"):
        load(tmp_path, IMAGES)


def test_images_are_cropped_as_the_checkpoint_wants(
    clip_folder: Path, colour_data: Path, zero_shot_recipe: Make
) -> None:
    """Shortest edge to 36, then the middle 32x32: what the folder's own processor does, up to rounding."""
    import transformers
    from PIL import Image

    ramp = np.linspace(0, 255, 90, dtype=np.uint8)
    image = Image.fromarray(np.stack([np.tile(ramp, (60, 1))] * 3, -1))
    processor = load_sources(validate(zero_shot_recipe(), Path("/"))).processor
    wanted = transformers.AutoImageProcessor.from_pretrained(clip_folder)(image, return_tensors="pt")["pixel_values"]
    got = processor._from_files([image])  # type: ignore[attr-defined]
    assert got.shape == wanted.shape and float((got - wanted).abs().max()) < 0.05


def test_embeddings_of_a_timm_model(vit_checkpoint: Path, vit_recipe: Make) -> None:
    model = {**vit_recipe()["model"], "task": IMAGES, "weights": "random", "args": {**VIT_ARGS, "num_classes": 0}}
    recipe = vit_recipe(model=model, data={"calibration": vit_recipe()["data"]["calibration"]})
    sources = load_sources(validate(recipe, Path("/")))
    with torch.no_grad():
        assert sources.model(**sources.fixed(2)).shape == (2, 32)
    assert sources.model.output_name == "image_embedding"


def test_the_tokenizer_gives_a_mask_only_where_it_is_read(
    siglip_folder: Path, clip_folder: Path, bert_recipe: Callable[..., dict[str, Any]]
) -> None:
    for folder, names in ((siglip_folder, ["input_ids"]), (clip_folder, ["input_ids", "attention_mask"])):
        recipe = validate(bert_recipe(model={"source": str(folder), "task": TEXTS}), Path("/"))
        sources = load_sources(recipe)
        assert isinstance(sources.processor, TextProcessor)
        assert list(sources.fixed(2)) == names
