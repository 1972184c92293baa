"""Cross-encoders of sentence-transformers output what `CrossEncoder.predict` gives."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from optin_export.data import Examples, Sources, load_sources
from optin_export.errors import InputError
from optin_export.models import build
from optin_export.recipe import validate
from tests.conftest import enlarge
from tests.sentence_folders import SIZES, TEXTS, change, save_tokenizer

pytest.importorskip("sentence_transformers")
PAIRS = {"text": TEXTS, "text_pair": TEXTS[::-1]}


@pytest.fixture(scope="module", params=[1, 3])
def plain(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sequence classifier of one or three outputs that no library of cross-encoders has seen."""
    import transformers

    folder = tmp_path_factory.mktemp("cross") / "plain"
    save_tokenizer(folder)
    shape = {"num_attention_heads": 4, "intermediate_size": 64, "max_position_embeddings": 64}
    config = transformers.BertConfig(**SIZES, **shape, num_labels=request.param)
    enlarge(transformers.BertForSequenceClassification(config)).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(plain: Path, tmp_path: Path) -> Path:
    shutil.copytree(plain, tmp_path / "copy")
    return tmp_path / "copy"


def sources(folder: Path, sequence: int = 64) -> Sources:
    rows = folder.parent / f"{folder.name}.csv"
    lines = [f"{first},{second},0\n" for first, second in zip(*PAIRS.values(), strict=True)]
    rows.write_text("".join(lines), encoding="utf-8")
    columns = {"text": 0, "text_pair": 1}
    recipe = {
        "recipe": 1,
        "name": "tiny",
        "model": {"source": str(folder), "task": "text-classification"},
        "data": {"calibration": {"source": f"csv:{rows}", "columns": columns, "header": False}},
        "prune": {"budget": {"macs": 0.9}},
        "export": {"sequence": sequence},
    }
    return load_sources(validate(recipe, folder))


def predicted(folder: Path) -> torch.Tensor:
    from sentence_transformers import CrossEncoder

    model = CrossEncoder(str(folder), device="cpu", local_files_only=True)
    pairs = list(zip(*PAIRS.values(), strict=True))
    return model.predict(pairs, convert_to_tensor=True, show_progress_bar=False).reshape(len(TEXTS), -1)


def same(folder: Path, **fields: Any) -> Sources:
    loaded = sources(folder, **fields)
    inputs, wanted = loaded.processor.encode(Examples(PAIRS)), predicted(folder)
    again = build(json.loads(json.dumps(loaded.loaded.architecture)))
    again.load_state_dict(loaded.model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(**inputs), wanted, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(again(**inputs), wanted, atol=1e-5, rtol=1e-5)
    assert again.output_name == loaded.model.output_name
    return loaded


def test_a_folder_that_the_library_wrote(plain: Path, tmp_path: Path) -> None:
    from sentence_transformers import CrossEncoder

    CrossEncoder(str(plain), max_length=14, device="cpu").save_pretrained(str(tmp_path / "ce"))
    one = json.loads((plain / "config.json").read_text())["id2label"].keys() == {"0"}
    loaded = same(tmp_path / "ce")
    assert loaded.model.output_name == ("scores" if one else "logits")
    assert any("at 14 tokens" in text for text in loaded.warnings)
    same(tmp_path / "ce", sequence=14)
    for activation in ("Identity", "Sigmoid", "Tanh"):
        path = f"torch.nn.modules.{'linear' if activation == 'Identity' else 'activation'}.{activation}"
        change(tmp_path / "ce" / "config_sentence_transformers.json", activation_fn=path)
        same(tmp_path / "ce")


@pytest.mark.parametrize("activation", [None, "torch.nn.modules.linear.Identity", "torch.nn.modules.activation.Tanh"])
def test_folders_of_older_versions(activation: str | None, folder: Path) -> None:
    """The activation is in config.json; without one a single score gets a sigmoid."""
    own = {} if activation is None else {"activation_fn": activation}
    change(folder / "config.json", sentence_transformers={"version": "4.1.0", **own})
    same(folder)
    change(folder / "config.json", sentence_transformers=None)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "sbert_ce_default_activation_function": activation}))
    same(folder)


def test_a_prompt_is_put_before_the_first_text(plain: Path, tmp_path: Path) -> None:
    from sentence_transformers import CrossEncoder

    options = {"prompts": {"ask": "query : "}, "default_prompt_name": "ask"}
    CrossEncoder(str(plain), device="cpu", **options).save_pretrained(str(tmp_path / "ce"))
    same(tmp_path / "ce")


def test_a_plain_classifier_keeps_its_logits(plain: Path) -> None:
    """No file says that it is a cross-encoder: what is output is what the model of transformers outputs."""
    import transformers

    model = transformers.AutoModelForSequenceClassification.from_pretrained(plain).eval()
    loaded = sources(plain)
    inputs = loaded.processor.encode(Examples(PAIRS))
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(**inputs), model(**inputs).logits, atol=1e-5, rtol=1e-5)
    assert loaded.model.output_name == "logits" and loaded.loaded.sentence is None


@pytest.mark.parametrize(
    ("module", "said"),
    [
        ("sentence_transformers.cross_encoder.modules.logit_score.LogitScore", "LogitScore"),
        ("sentence_transformers.base.modules.dense.Dense", "Dense"),
    ],
)
def test_other_kinds_of_cross_encoders_are_refused(module: str, said: str, plain: Path, tmp_path: Path) -> None:
    from sentence_transformers import CrossEncoder

    folder = tmp_path / "ce"
    CrossEncoder(str(plain), device="cpu").save_pretrained(str(folder))
    listed = json.loads((folder / "modules.json").read_text())
    (folder / "modules.json").write_text(json.dumps([*listed, {"idx": 1, "name": "1", "path": "1", "type": module}]))
    with pytest.raises(InputError, match=f"the module {said} of"):
        sources(folder)
    (folder / "modules.json").write_text(json.dumps(listed))
    change(folder / "sentence_bert_config.json", transformer_task="text-generation")
    with pytest.raises(InputError, match="transformer_task text-generation"):
        sources(folder)
    change(folder / "sentence_bert_config.json", transformer_task="sequence-classification")
    change(folder / "config_sentence_transformers.json", activation_fn="my_code.Scale")
    with pytest.raises(InputError, match=r"my_code\.Scale"):
        sources(folder)
