"""Exported folders give the run's own outputs in their libraries, in a process that cannot import this package."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from optin_export.data import Examples, load_sources
from optin_export.formats import write_folder
from optin_export.formats.run import FinishedRun
from optin_export.report.schema import Report, read_report
from tests import sentence_folders
from tests.conftest import VIT_ARGS, enlarge, sentences
from tests.formats.hub import local_hub
from tests.formats.made import made_run, outputs_of
from tests.textmodels import SMALL, recipe_for, save_small, spoken

SCRIPT = Path(__file__).with_name("outside.py")
TEXTS = sentences(5, 9)
#: Text classifiers by name, of families of this package and of none: their heads and neurons differ by layer.
CLASSIFIERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertForSequenceClassification", {}),
    "modernbert": ("ModernBertForSequenceClassification", {"cls_token_id": 2, "sep_token_id": 3, "pad_token_id": 0}),
    "deberta": ("DebertaV2ForSequenceClassification", {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}),
}
HF = (*CLASSIFIERS, "sentences", "llama", "gpt2", "mpnet", "t5", "vit")
TIMM: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": VIT_ARGS,
    "resnet10t": {"in_chans": 1, "num_classes": 5},
    "beit_base_patch16_224": VIT_ARGS,
}


@dataclass(frozen=True)
class Exported:
    run: FinishedRun
    folder: Path


@pytest.fixture(scope="module")
def report(finished_vit: Path) -> Report:
    return read_report(finished_vit)


def text_model(folder: Path, name: str) -> dict[str, Any]:
    """A recipe of a small text model with random weights in `folder`."""
    folder.mkdir()
    small: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
    kinds: dict[str, tuple[str, dict[str, Any]]] = {
        **{key: (kind, {"num_labels": 3, **more}) for key, (kind, more) in CLASSIFIERS.items()},
        "sentences": ("BertModel", {}),
        "mpnet": ("MPNetModel", {}),
        "llama": ("LlamaForCausalLM", {"num_key_value_heads": 2, "tie_word_embeddings": True, **small}),
        "gpt2": ("GPT2LMHeadModel", small),
        "t5": ("T5EncoderModel", {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}),
    }
    kind, more = kinds[name]
    save_small(folder, kind, **more)
    texts = spoken(folder)
    if name in ("llama", "gpt2"):
        return recipe_for("text-generation", folder, texts)
    task = "text-classification" if name in CLASSIFIERS else "feature-extraction"
    source = {"source": f"py:{texts}:texts", "samples": 32}
    model: dict[str, Any] = {"source": str(folder), "task": task}
    if task == "feature-extraction":
        model |= {"pooling": "mean", "normalize": True}
    return {
        **recipe_for("text-generation", folder, texts),
        "model": model,
        "data": {"calibration": source},
    }


def image_model(folder: Path) -> dict[str, Any]:
    folder.mkdir()
    sizes = {key: value for key, value in SMALL.items() if key != "max_position_embeddings"}
    config = transformers.ViTConfig(**sizes, image_size=32, patch_size=8, num_labels=5)
    enlarge(transformers.ViTForImageClassification(config)).save_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return {"model": {"source": str(folder), "task": "image-classification"}}


def sentence_modules(folder: Path) -> dict[str, Any]:
    """A folder of sentence-transformers with a prompt, two poolings and layers behind them."""
    from sentence_transformers.sentence_transformer import modules

    folder.mkdir()
    (folder / "rows.csv").write_text("".join(f"{text}\n" for text in sentences(40, 4)), encoding="utf-8")
    behind = [modules.Pooling(32, pooling_mode=["mean", "max"]), modules.Dense(64, 16), modules.LayerNorm(16)]
    prompts = {"prompts": {"query": "query : "}, "default_prompt_name": "query"}
    source = sentence_folders.build(folder / "st", sentence_folders.bert(folder / "bert"), behind, **prompts)
    rows = {"source": f"csv:{folder / 'rows.csv'}", "columns": {"text": 0}, "header": False}
    return {
        "recipe": 1,
        "name": "small",
        "model": {"source": str(source), "task": "feature-extraction"},
        "data": {"calibration": rows},
        "prune": {"budget": {"macs": 0.6}},
        "export": {"batch": [1, 3], "sequence": 16},
    }


@pytest.fixture(scope="module")
def exported(report: Report, image_data: Path, colour_data: Path, tmp_path_factory: Any) -> dict[str, Exported]:
    """Every model in the format that it is loaded from."""
    base = tmp_path_factory.mktemp("formats")
    recipes = {name: text_model(base / f"model-{name}", name) for name in HF if name != "vit"}
    recipes["st"] = text_model(base / "model-st", "sentences")
    recipes["st-modules"] = sentence_modules(base / "model-st-modules")
    images = {"calibration": {"source": f"npz:{colour_data / 'images.npz'}", "samples": 32}}
    short = {"recipe": 1, "name": "small", "prune": {"budget": {"macs": 0.6}}, "export": {"batch": [1, 3]}}
    recipes["vit"] = {**short, "data": images, **image_model(base / "model-vit")}
    grey = {"calibration": {"source": f"npz:{image_data / 'images.npz'}", "samples": 32}}
    for name, args in TIMM.items():
        preprocess = {"size": [32, 32], "mean": [0.5], "std": [0.5]}
        model = {"source": f"timm:{name}", "task": "image-classification", "weights": "random", "args": args}
        recipes[name] = {**short, "data": grey, "model": {**model, "preprocess": preprocess}}
    found = {}
    for name, raw in recipes.items():
        format = "sentence-transformers" if name.startswith("st") else "timm" if name in TIMM else "hf"
        (base / f"run-{name}").mkdir()
        run = made_run(raw, base / f"run-{name}", report, "down_proj" if name == "llama" else None)
        found[name] = Exported(run, write_folder(run, format, base / name))
    return found


@dataclass(frozen=True)
class Answers:
    folder: Path
    values: dict[str, Any]
    hub: Path

    def of(self, name: str) -> dict[str, torch.Tensor]:
        return load_file(self.folder / f"{name}.safetensors")


@pytest.fixture(scope="module")
def image(colour_data: Path, tmp_path_factory: Any) -> Path:
    from PIL import Image

    path = tmp_path_factory.mktemp("image") / "one.png"
    Image.fromarray(np.load(colour_data / "images.npz")["images"][0]).save(path)
    return Path(path)


@pytest.fixture(scope="module")
def answers(exported: dict[str, Exported], image: Path, tmp_path_factory: Any) -> Iterator[Answers]:
    """What the libraries give, in one process of their own."""
    place = tmp_path_factory.mktemp("answers")
    for name, one in exported.items():
        save_file({key: rows.contiguous() for key, rows in one.run.rows[0].items()}, place / f"in-{name}.safetensors")
    with local_hub(place / "hub") as url:
        job = {
            "folders": {name: str(one.folder) for name, one in exported.items()},
            "inputs": {name: str(place / f"in-{name}.safetensors") for name in exported},
            **{"texts": TEXTS, "image": str(image), "hub": url},
        }
        (place / "job.json").write_text(json.dumps(job))
        environment = {**os.environ, "HF_HUB_OFFLINE": "0", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-I", str(SCRIPT), str(place / "job.json"), str(place)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    yield Answers(place, json.loads((place / "answers.json").read_text()), place / "hub")


def states_or_logits(run: FinishedRun) -> torch.Tensor:
    """What transformers' class returns: the states before the pooling, or the logits."""
    if run.task != "feature-extraction":
        return outputs_of(run.model, run)
    with torch.no_grad():
        states: torch.Tensor = run.model.model(**run.rows[0]).last_hidden_state
    return states


def counted(run: FinishedRun, values: torch.Tensor) -> torch.Tensor:
    """Without the positions of padding, at which attention implementations differ."""
    mask = run.rows[0].get("attention_mask")
    return values if mask is None or values.dim() != 3 else values[mask.bool()]


@pytest.mark.parametrize("name", HF)
def test_transformers_gives_the_outputs_of_the_run(exported: Any, answers: Answers, name: str) -> None:
    run, found = exported[name].run, answers.of(name)
    expected = counted(run, states_or_logits(run))
    for key in ("output", "again"):  # `again`: after save_pretrained
        torch.testing.assert_close(counted(run, found[key]), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["st", "st-modules"])
def test_sentence_transformers_gives_the_embeddings_of_the_run(exported: Any, answers: Answers, name: str) -> None:
    run = exported[name].run
    inputs = load_sources(run.recipe).processor.encode(Examples({"text": TEXTS}))
    with torch.no_grad():
        expected = run.model(**inputs)
    torch.testing.assert_close(answers.of(name)["output"], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", list(TIMM))
def test_timm_gives_the_outputs_of_the_run(exported: Any, answers: Answers, name: str) -> None:
    run = exported[name].run
    torch.testing.assert_close(answers.of(name)["output"], outputs_of(run.model, run), rtol=1e-5, atol=1e-5)


def test_a_decoder_generates_with_its_cache_what_it_gives_without(exported: Any, answers: Answers) -> None:
    for name in ("llama", "gpt2"):
        run = exported[name].run
        tokens = run.rows[0]["input_ids"][:1, :4]
        for _ in range(5):
            with torch.no_grad():
                logits = run.model(tokens, torch.ones_like(tokens))
            tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], 1)
        assert answers.of(name)["generated"].tolist() == tokens.tolist()


def test_pipelines_give_the_probabilities_of_the_run(exported: Any, answers: Answers, image: Path) -> None:
    run = exported["bert"].run
    tokenizer = transformers.AutoTokenizer.from_pretrained(run.recipe.model.source)
    with torch.no_grad():
        inputs = tokenizer(TEXTS, padding=True, return_tensors="pt")
        expected = run.model(**{key: inputs[key] for key in run.rows[0]}).softmax(-1)
    for found, wanted in zip(answers.values["texts"], expected, strict=True):
        scores = {one["label"]: one["score"] for one in found}
        assert [scores[f"LABEL_{index}"] for index in range(3)] == pytest.approx(wanted.tolist(), abs=1e-5)
    from PIL import Image

    run = exported["vit"].run
    processor = transformers.AutoImageProcessor.from_pretrained(run.recipe.model.source)
    with torch.no_grad():
        logits = run.model(processor(Image.open(image), return_tensors="pt")["pixel_values"])
    scores = {one["label"]: one["score"] for one in answers.values["image"]}
    assert [scores[f"LABEL_{index}"] for index in range(5)] == pytest.approx(logits.softmax(-1)[0].tolist(), abs=1e-5)


def test_trainer_trains_every_weight_and_what_it_saves_loads(answers: Answers, exported: Any) -> None:
    trained = set(answers.values["changed"])
    names = {name for name, _ in exported["bert"].run.model.model.named_parameters()}
    assert trained == names
    assert 0 < answers.values["loss"] < 10
    assert answers.values["trained"]


def test_what_is_pushed_to_the_hub_is_the_whole_folder(answers: Answers, exported: Any) -> None:
    own = exported["bert"].folder
    for name in ("config.json", "model.safetensors", "modeling_pruned.py"):
        assert (answers.hub / name).is_file(), name
    assert (answers.hub / "modeling_pruned.py").read_bytes() == (own / "modeling_pruned.py").read_bytes()
    ours, theirs = load_file(own / "model.safetensors"), load_file(answers.hub / "model.safetensors")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert json.loads((answers.hub / "config.json").read_text())["pruned"]


def test_tokenizers_and_processors_are_those_of_the_original(exported: Any) -> None:
    for name, file in (
        ("bert", "tokenizer.json"),
        ("bert", "tokenizer_config.json"),
        ("vit", "preprocessor_config.json"),
    ):
        original = Path(exported[name].run.recipe.model.source) / file
        assert (exported[name].folder / file).read_bytes() == original.read_bytes()


@pytest.mark.parametrize("name", ["bert", "vit_tiny_patch16_224"])
def test_the_python_file_depends_on_its_library_alone(exported: Any, name: str) -> None:
    (path,) = exported[name].folder.glob("*.py")
    tree = ast.parse(path.read_text(encoding="utf-8"))
    modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    outside = {module.partition(".")[0] for module in modules} - set(sys.stdlib_module_names)
    assert outside <= {"torch", "transformers"} or outside <= {"torch", "timm", "safetensors"}


def test_an_unpruned_checkpoint_still_loads_through_the_same_class(exported: Any, tmp_path: Path) -> None:
    """Without `pruned` in the configuration the class is transformers' own."""
    from optin_export.formats.transformers_folder import _class_in

    cls = _class_in(exported["bert"].folder / "modeling_pruned.py", "BertForSequenceClassification")
    source = exported["bert"].run.recipe.model.source
    expected = transformers.BertForSequenceClassification.from_pretrained(source).state_dict()
    found = cls.from_pretrained(source).state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_the_graph_of_token_states_gives_what_the_library_pools(exported: Any) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    run = exported["st"].run
    session = onnxruntime.InferenceSession(exported["st"].folder / "onnx" / "model.onnx")
    assert [one.name for one in session.get_outputs()] == ["last_hidden_state"]
    (found,) = session.run(None, {name: rows.numpy() for name, rows in run.rows[0].items()})
    expected = counted(run, states_or_logits(run))
    torch.testing.assert_close(counted(run, torch.from_numpy(found)), expected, rtol=1e-4, atol=1e-5)
