"""Model sources: what can be loaded is, and what cannot is one clear InputError; no file may run code unasked."""

from __future__ import annotations

import json
import pickle
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from optin_export.errors import InputError
from optin_export.models.loading import LoadedModel, build, load_model
from optin_export.recipe import ModelSection
from tests.conftest import VIT_ARGS

VIT: dict[str, Any] = {
    "source": "timm:vit_tiny_patch16_224",
    "task": "image-classification",
    "weights": "random",
    "args": VIT_ARGS,
}


def load(seed: int = 0, **fields: Any) -> LoadedModel:
    return load_model(ModelSection.model_validate(fields), seed)


def refused(**fields: Any) -> InputError:
    with pytest.raises(InputError) as caught:
        load(**fields)
    assert str(caught.value).count("\n") == 2 and caught.value.why and caught.value.exit_code == 2
    return caught.value


def same_weights(first: LoadedModel, second: LoadedModel) -> bool:
    one, other = first.model.state_dict(), second.model.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def bert_copy(bert_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bert_folder, tmp_path / "bert"))


class Bomb:
    """Unpickling it makes a file: the mark of code that ran."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


# --- architectures without a checkpoint -------------------------------------------------------------------------------

BERT: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 40,
    "num_labels": 3,
}
OF_TYPE: dict[str, Any] = {"source": "hf:model_type=bert", "task": "text-classification", "weights": "random"}


def test_an_architecture_of_transformers_by_its_type(tmp_path: Path) -> None:
    loaded = load(**OF_TYPE, args=BERT)
    assert loaded.architecture["class"] == "BertForSequenceClassification" and loaded.origin is None
    assert loaded.architecture["config"]["hidden_size"] == 32
    assert same_weights(loaded, load(**OF_TYPE, args=BERT)) and not same_weights(loaded, load(1, **OF_TYPE, args=BERT))
    rebuilt = build(json.loads(json.dumps(loaded.architecture)))
    assert rebuilt.state_dict().keys() == loaded.model.state_dict().keys()
    save_file(loaded.model.model.state_dict(), tmp_path / "bert.safetensors")
    again = load(2, **{**OF_TYPE, "weights": str(tmp_path / "bert.safetensors")}, args=BERT)
    assert same_weights(loaded, again)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"source": "hf:model_type=brt"}, "use one of its types: bert"),
        ({"args": {"hiden_size": 3}}, "use one of its fields, such as hidden_size"),
        ({"weights": "pretrained"}, "names an architecture, not a checkpoint"),
        ({"task": "image-classification"}, "image-classification"),
        ({"args": {"hidden_size": "wide"}}, "cannot load the model"),
    ],
)
def test_a_type_that_does_not_fit(fields: dict[str, Any], says: str) -> None:
    assert says in str(refused(**{**OF_TYPE, **fields}))


# --- folders --------------------------------------------------------------------------------------------------------


def test_a_folder_of_transformers(bert_folder: Path) -> None:
    loaded = load(source=str(bert_folder), task="text-classification")
    assert not loaded.model.training and loaded.labels == {}  # its own: see class_names
    assert all(
        parameter.dtype == torch.float32 and not parameter.requires_grad for parameter in loaded.model.parameters()
    )
    rebuilt = build(json.loads(json.dumps(loaded.architecture)))
    assert rebuilt.state_dict().keys() == loaded.model.state_dict().keys()


def test_a_folder_of_timm_keeps_its_own_arguments(tmp_path: Path) -> None:
    import timm
    from timm.models import save_for_hf

    model = timm.create_model("vit_tiny_patch16_224", **VIT_ARGS)
    save_for_hf(model, str(tmp_path), model_args=VIT_ARGS)
    loaded = load(source=str(tmp_path), task="image-classification")
    assert loaded.architecture["name"] == "vit_tiny_patch16_224"
    assert torch.equal(loaded.model.model.get_parameter("head.weight"), model.head.weight)
    rebuilt = build(json.loads(json.dumps(loaded.architecture)))
    rebuilt.load_state_dict(loaded.model.state_dict())


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (None, "No such file"),
        ("", "no readable config.json"),
        ("{", "no readable config.json"),
        ("[1]", "not a JSON object"),
        ("5", "not a JSON object"),
        ("[" * 100_000, "no readable config.json"),
        ("{}", "neither 'model_type'"),
        ('{"model_type": "no-such-type"}', "no-such-type"),
        ('{"model_type": 5}', "hf:"),
        ('{"model_type": "bert", "hidden_size": "wide"}', "hf:"),
        ('{"architecture": "no_such_vit"}', "no_such_vit"),
    ],
)
def test_a_folder_with_a_bad_config(tmp_path: Path, config: str | None, says: str) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(config, encoding="utf-8")
    assert says in str(refused(source=str(tmp_path), task="text-classification"))


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    assert "No such file" in refused(source=str(tmp_path / "none"), task="text-classification").why
    (tmp_path / "file").write_text("x", encoding="utf-8")
    assert "cannot load a model" in refused(source=str(tmp_path / "file"), task="text-classification").what


def test_truncated_and_missing_weights_in_a_folder(bert_copy: Path) -> None:
    weights = bert_copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    assert "cannot load the model" in refused(source=str(bert_copy), task="text-classification").what
    weights.unlink()
    assert "cannot load the model" in refused(source=str(bert_copy), task="text-classification").what


def test_weights_of_another_shape_in_a_folder(bert_copy: Path) -> None:
    config = json.loads((bert_copy / "config.json").read_text(encoding="utf-8"))
    (bert_copy / "config.json").write_text(json.dumps({**config, "hidden_size": 64}), encoding="utf-8")
    assert "cannot load the model" in refused(source=str(bert_copy), task="text-classification").what


def test_a_model_without_the_head_of_the_task_is_not_filled_with_random_numbers(bert_copy: Path) -> None:
    state = load_file(bert_copy / "model.safetensors")
    kept = {name: value for name, value in state.items() if not name.startswith("classifier.")}
    save_file(kept, bert_copy / "model.safetensors", metadata={"format": "pt"})
    assert "classifier" in refused(source=str(bert_copy), task="text-classification").why
    kept = {name: value for name, value in kept.items() if "pooler" not in name}
    save_file(kept, bert_copy / "model.safetensors", metadata={"format": "pt"})
    load(source=str(bert_copy), task="feature-extraction")


def test_weights_that_the_task_does_not_use_are_told(bert_copy: Path) -> None:
    assert load(source=str(bert_copy), task="text-classification").notes == ()
    notes = load(source=str(bert_copy), task="feature-extraction").notes
    assert len(notes) == 1 and "2 weights that feature-extraction does not use" in notes[0]
    assert "classifier.bias, classifier.weight" in notes[0]


def test_layers_beyond_the_configuration_are_refused(bert_copy: Path) -> None:
    config = json.loads((bert_copy / "config.json").read_text(encoding="utf-8"))
    (bert_copy / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}), encoding="utf-8")
    for task in ("text-classification", "feature-extraction"):
        error = refused(source=str(bert_copy), task=task)
        assert "more layers" in error.what and "encoder.layer.2." in error.why


def test_a_part_called_base_layer_is_no_adapter() -> None:
    loaded = load(source="timm:dla34", task="image-classification", weights="random")
    assert loaded.model(torch.zeros(1, 3, 64, 64)).shape == (1, 1000)


def test_weights_with_nan_are_named(bert_copy: Path) -> None:
    state = load_file(bert_copy / "model.safetensors")
    name = next(name for name in state if name.endswith("word_embeddings.weight"))
    state[name][3, 0] = float("nan")
    save_file(state, bert_copy / "model.safetensors", metadata={"format": "pt"})
    assert "word_embeddings.weight holds NaN" in refused(source=str(bert_copy), task="feature-extraction").why


# --- code that must not run -----------------------------------------------------------------------------------------


def test_code_that_comes_with_a_model_runs_only_if_trusted(bert_copy: Path, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    config = json.loads((bert_copy / "config.json").read_text(encoding="utf-8"))
    names = {"AutoConfig": "modeling.OwnConfig", "AutoModel": "modeling.OwnModel"}
    for kind in ("own-type", "bert"):
        described = {**config, "model_type": kind, "auto_map": names}
        (bert_copy / "config.json").write_text(json.dumps(described), encoding="utf-8")
        (bert_copy / "modeling.py").write_text(
            f"import pathlib\npathlib.Path({str(mark)!r}).touch()\n", encoding="utf-8"
        )
        start = time.monotonic()
        if kind == "own-type":
            refused(source=f"hf:{bert_copy}", task="feature-extraction")
        else:
            load(source=f"hf:{bert_copy}", task="feature-extraction")
        assert not mark.exists() and time.monotonic() - start < 10  # nor is anybody asked at the terminal


@pytest.mark.parametrize("name", ["checkpoint.pt", "checkpoint.bin", "checkpoint.safetensors"])
def test_a_pickle_disguised_as_a_checkpoint_runs_nothing(tmp_path: Path, name: str) -> None:
    mark = tmp_path / "ran"
    for content in (Bomb(mark), {"state_dict": {"weight": Bomb(mark)}}):
        (tmp_path / name).write_bytes(pickle.dumps(content))
        assert "cannot read the checkpoint" in refused(**{**VIT, "weights": str(tmp_path / name)}).what
        torch.save(content, tmp_path / name)
        assert "cannot read the checkpoint" in refused(**{**VIT, "weights": str(tmp_path / name)}).what
    assert not mark.exists()


def test_a_pickle_disguised_as_the_weights_of_a_folder_runs_nothing(bert_copy: Path, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    (bert_copy / "model.safetensors").unlink()
    torch.save({"weight": Bomb(mark)}, bert_copy / "pytorch_model.bin")
    refused(source=str(bert_copy), task="text-classification")
    folder = tmp_path / "timm"
    folder.mkdir()
    config = {"architecture": "vit_tiny_patch16_224", "model_args": VIT_ARGS}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    torch.save({"weight": Bomb(mark)}, folder / "pytorch_model.bin")
    refused(source=str(folder), task="image-classification")
    assert not mark.exists()


# --- checkpoints ----------------------------------------------------------------------------------------------------


def test_a_checkpoint_as_safetensors_state_dict_or_wrapped(vit_checkpoint: Path, tmp_path: Path) -> None:
    wanted = load(**{**VIT, "weights": str(vit_checkpoint)})
    state = load_file(vit_checkpoint)
    for index, content in enumerate(
        (state, {"state_dict": state}, {"model": {f"module.{key}": value for key, value in state.items()}})
    ):
        torch.save(content, tmp_path / f"{index}.pt")
        assert same_weights(load(**{**VIT, "weights": str(tmp_path / f"{index}.pt")}), wanted)


def test_bad_checkpoints(vit_checkpoint: Path, tmp_path: Path) -> None:
    def why(name: str, **changes: Any) -> str:
        return str(refused(**{**VIT, "weights": str(tmp_path / name), **changes}))

    whole = vit_checkpoint.read_bytes()
    for name in ("cut.safetensors", "cut.pt"):
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
        assert "cannot read the checkpoint" in why(name)
    assert "cannot read the checkpoint" in why("none.safetensors")
    (tmp_path / "folder.pt").mkdir()
    assert "cannot read the checkpoint" in why("folder.pt")
    for index, content in enumerate(([1, 2], {"a": 5}, {0: torch.zeros(1)}, torch.zeros(2), None)):
        torch.save(content, tmp_path / f"{index}.pt")
        assert "holds no state dict" in why(f"{index}.pt"), content
    state = load_file(vit_checkpoint)
    save_file({**state, "head.weight": torch.zeros(7, 32)}, tmp_path / "shape.safetensors")
    assert "does not fit" in why("shape.safetensors") and "head.weight" in why("shape.safetensors")
    save_file({key: value for key, value in state.items() if key != "head.weight"}, tmp_path / "less.safetensors")
    assert "does not fit" in why("less.safetensors")
    save_file({**state, "head.weight": torch.full((5, 32), float("inf"))}, tmp_path / "inf.safetensors")
    assert "head.weight holds NaN or infinity" in why("inf.safetensors")


# --- timm and the hub -----------------------------------------------------------------------------------------------


def test_random_weights_follow_the_seed(bert_folder: Path) -> None:
    for fields in (VIT, {"source": str(bert_folder), "task": "text-classification", "weights": "random"}):
        assert same_weights(load(3, **fields), load(3, **fields))
        assert not same_weights(load(3, **fields), load(4, **fields))


def test_an_unknown_name_is_told_with_similar_ones() -> None:
    assert "vit_tiny_patch16_224" in refused(**{**VIT, "source": "timm:vit_tiny_patch16_242"}).fix
    refused(**{**VIT, "source": "timm:qqqqqqqq"})


@pytest.mark.parametrize("args", [{"no_such": 1}, {"depth": "deep"}, {"embed_dim": 33}, {"pretrained": True}])
def test_wrong_arguments(args: dict[str, Any]) -> None:
    assert "cannot create" in refused(**{**VIT, "args": {**VIT_ARGS, **args}}).what


def test_a_folder_in_the_working_directory_is_not_taken_for_a_timm_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "vit_tiny_patch16_224").mkdir()
    monkeypatch.chdir(tmp_path)
    assert load(**VIT).architecture["name"] == "vit_tiny_patch16_224"


@pytest.mark.parametrize("source", ["hf:no-such-owner/no-such-model", "hf:", "timm:hf-hub:no-such-owner/no-such-model"])
def test_without_network_a_hub_name_fails_quickly(source: str) -> None:
    start = time.monotonic()
    task = "image-classification" if source.startswith("timm") else "text-classification"
    refused(source=source, task=task)
    assert time.monotonic() - start < 20


# --- the user's own function ----------------------------------------------------------------------------------------

FUNCTIONS = """
import torch
def good(width=4): return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, width))
def raises(): raise RuntimeError("no such file: weights.pt")
def leaves(): raise SystemExit(0)
def nothing(): pass
def state(): return torch.nn.Linear(2, 2).state_dict()
def model_class(): return torch.nn.Linear
"""


def test_a_model_of_the_users_own_function(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(FUNCTIONS, encoding="utf-8")
    source = f"py:{tmp_path / 'own.py'}"
    loaded = load(source=f"{source}:good", task="image-classification", args={"width": 3})
    assert loaded.model(torch.zeros(2, 1, 8, 8)).shape == (2, 3)
    assert build(loaded.architecture, trust_python=True)(torch.zeros(1, 1, 8, 8)).shape == (1, 3)
    with pytest.raises(InputError, match="cannot rebuild"):
        build(loaded.architecture)
    told: dict[str, str] = {"raises": "no such file: weights.pt", "leaves": "SystemExit", "nothing": "NoneType"}
    told |= {"state": "OrderedDict", "model_class": "type", "absent": "absent"}
    for name, why in told.items():
        assert why in refused(source=f"{source}:{name}", task="image-classification").why
    assert "width" in refused(source=f"{source}:raises", task="image-classification", args={"width": 3}).why


def test_a_rebuilt_class_must_be_a_model_of_transformers() -> None:
    for name in ("Nothing", "pipeline", "AutoTokenizer"):
        with pytest.raises(InputError, match="no such model class"):
            build({"library": "transformers", "class": name, "config": {}})
