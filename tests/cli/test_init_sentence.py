"""What `init` reads in a folder of sentence-transformers: its JSON files, which need no weights and no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from optin_export import cli
from optin_export.cli import init as init_module
from optin_export.cli._guess import sentence_of, task_of
from optin_export.cli.dry_run.work import planned_work
from optin_export.recipe import load_recipe
from optin_export.sentence import find_sentence_folder, transformer_folder

PREFIX = "sentence_transformers.models"


def write(folder: Path, files: dict[str, Any]) -> Path:
    for name, value in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(value), encoding="utf-8")
    return folder


def listed(*modules: tuple[str, str]) -> list[dict[str, Any]]:
    return [{"idx": i, "name": str(i), "path": path, "type": kind} for i, (kind, path) in enumerate(modules)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    modules = listed((f"{PREFIX}.Transformer", "0_Transformer"), (f"{PREFIX}.Pooling", "1_Pooling"))
    return write(
        tmp_path / "st",
        {
            "modules.json": modules,
            "0_Transformer/config.json": {"model_type": "bert", "max_position_embeddings": 514},
            "0_Transformer/sentence_bert_config.json": {"max_seq_length": 40},
            "1_Pooling/config.json": {"word_embedding_dimension": 8, "pooling_mode_lasttoken": True},
        },
    )


def init(folder: Path, place: Path, *words: str) -> int:
    (place / "rows.csv").write_text("text\na\n")
    given = ["--model", str(folder), "--data", f"csv:{place / 'rows.csv'}", "--goal", "macs=0.5", "--yes", "--force"]
    return cli.main(["init", *given, "--out", str(place / "recipe.yaml"), *words])


@pytest.fixture
def unfitted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without weights there is nothing that the recipe could be fitted to (see tests/fidelity for whole folders)."""
    monkeypatch.setattr(init_module, "_fitted", lambda raw, folder: [])


@pytest.mark.usefixtures("unfitted")
def test_what_the_folder_says_is_written(folder: Path, tmp_path: Path) -> None:
    assert task_of(str(folder)) == "feature-extraction"
    assert init(folder, tmp_path) == 0
    recipe = load_recipe(tmp_path / "recipe.yaml")
    assert (recipe.model.pooling, recipe.model.normalize) == ("last", False)
    text = (tmp_path / "recipe.yaml").read_text()
    assert "# modules.json of sentence-transformers says: last pooling; it cuts texts at 40 tokens" in text
    assert planned_work(recipe, tmp_path)  # config.json is where the folder says, not at its top
    assert transformer_folder(folder) == folder / "0_Transformer"


@pytest.mark.usefixtures("unfitted")
def test_several_poolings_are_left_to_the_folder(folder: Path, tmp_path: Path) -> None:
    write(folder, {"1_Pooling/config.json": {"embedding_dimension": 8, "pooling_mode": ["mean", "max"]}})
    modules = json.loads((folder / "modules.json").read_text())
    write(folder, {"modules.json": [*modules, *listed((f"{PREFIX}.Normalize", "2_Normalize"))]})
    assert init(folder, tmp_path) == 0
    model = load_recipe(tmp_path / "recipe.yaml").model
    assert (model.pooling, model.normalize) == (None, True)
    assert "says: mean and max pooling, Normalize" in (tmp_path / "recipe.yaml").read_text()


@pytest.mark.parametrize(
    ("given", "tokenizer", "sequence"),
    [(None, 300, 300), (None, 10**30, None), (None, None, None), (4096, 512, 4096), (256, 512, 256)],
)
def test_lengths(given: int | None, tokenizer: int | None, sequence: int | None, folder: Path, tmp_path: Path) -> None:
    write(folder, {"0_Transformer/sentence_bert_config.json": {"max_seq_length": given, "do_lower_case": False}})
    write(folder, {"0_Transformer/tokenizer_config.json": {"model_max_length": tokenizer}})
    assert sentence_of(str(folder), "feature-extraction")[1] == sequence


def test_a_module_that_is_not_supported_is_named(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(folder, {"modules.json": listed((f"{PREFIX}.WordEmbeddings", "0_WordEmbeddings"))})
    assert init(folder, tmp_path, "--task", "feature-extraction") == 2
    assert "the module WordEmbeddings of" in capsys.readouterr().err


def test_kinds_of_folders(folder: Path, tmp_path: Path) -> None:
    for kind, task in (("CrossEncoder", "text-classification"), ("SentenceTransformer", "feature-extraction")):
        write(folder, {"config_sentence_transformers.json": {"model_type": kind}})
        assert task_of(str(folder)) == task_of(f"hf:{folder}") == task
    config = {"model_type": "bert", "sentence_transformers": {"version": "4.0"}, "id2label": {"0": "LABEL_0"}}
    cross = write(tmp_path / "cross", {"config.json": config})
    found, _ = sentence_of(str(cross), "text-classification")
    assert found is not None and found.activation == "Sigmoid" and not found.steps
    assert sentence_of(str(cross), "feature-extraction") == (None, None)
    assert sentence_of("timm:resnet18", "feature-extraction") == (None, None)
    assert sentence_of("hf:nobody/has-this", "feature-extraction") == (None, None)


def test_a_hub_model_in_the_local_cache(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def cached(name: str, file: str) -> str | None:
        assert name == "org/encoder"
        return str(folder / file) if (folder / file).is_file() else None

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", cached)
    assert task_of("hf:org/encoder") == "feature-extraction"
    found, longest = sentence_of("hf:org/encoder", "feature-extraction")
    assert found is not None and (found.poolings, longest) == (("last",), 40)
    # A run would ask the hub for what the cache does not have; where it cannot be reached, that is said.
    (folder / "modules.json").unlink()
    (folder / "config.json").write_text("{}")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *args: 1 / 0)
    none, told = find_sentence_folder("hf:org/encoder", "feature-extraction", fetch=True)
    assert none is None and len(told) == 1 and "modules.json is not known" in told[0]


def test_broken_files_are_told_from_missing_ones(folder: Path, tmp_path: Path) -> None:
    (folder / "modules.json").write_text("{")
    assert init(folder, tmp_path, "--task", "feature-extraction") == 2
    assert init(folder, tmp_path) == 2
