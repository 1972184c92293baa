"""What `--dry-run`, `doctor` and `init` say of a recipe is what the run says at its start, without loading weights."""

from __future__ import annotations

import json
import resource
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from optin_export import cli
from optin_export.cli import _machine
from optin_export.cli._guess import task_of
from optin_export.data import load_sources
from optin_export.models import Lookup, lookup
from optin_export.models.lookup import built
from optin_export.recipe import validate
from optin_export.stages import structures
from optin_export.stages.preflight import preflight
from tests.conftest import Make
from tests.textmodels import save_small

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(_machine, "checks", lambda folder: iter(()))  # the machine itself: tests/cli/test_doctor.py
    return folder


def words(told: str) -> str:
    """The error alone, without a library's bars of progress."""
    return "\n".join(line for line in told.splitlines() if line.startswith(("error: ", "  why: ", "  fix: ")))


def verdicts(raw: dict[str, Any], capsys: Capture) -> tuple[int, str]:
    """Exit code and error of the run, after those of the dry run and of doctor were seen to be the same."""
    Path("recipe.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
    dry = cli.main(["recipe.yaml", "--dry-run"])
    told = capsys.readouterr()
    dry_error = words(told.err)
    assert sorted(path.name for path in Path.cwd().iterdir()) == ["recipe.yaml"]  # nothing is written
    doctor = cli.main(["doctor", "recipe.yaml", "--json"])
    needed = json.loads(capsys.readouterr().out)["needed"]
    code = cli.main(["recipe.yaml", "--stop-after", "sources", "--quiet"])
    error = words(capsys.readouterr().err)
    shutil.rmtree("runs", ignore_errors=True)
    assert (dry, dry_error) == (code, error) and doctor == code
    refused = [one for one in needed if one["state"] in ("refused", "missing")]
    if code == 0:
        assert "the recipe is valid; a run" in told.out and not refused
    else:
        assert told.out == "" and refused
        assert all(f"{one['detail'].partition(': ')[0]}" in error for one in refused)
    return code, error


def of_text(folder: Path, data: Path, task: str = "text-classification", **sections: Any) -> dict[str, Any]:
    source = {"source": f"tsv:{data / 'classes.tsv'}", "columns": {"text": "sentence"}}
    return {
        "recipe": 1,
        "name": "tiny",
        "model": {"source": str(folder), "task": task},
        "data": {"calibration": source},
        "prune": {"budget": {"macs": 0.6}},
        "export": {"batch": [1], "sequence": 16},
        **sections,
    }


# --- the run accepts it, and so do they -----------------------------------------------------------------------------


def test_what_the_run_accepts(
    vit_recipe: Make, classifier_recipe: Make, zero_shot_recipe: Make, capsys: Capture
) -> None:
    for raw in (vit_recipe(), classifier_recipe(), zero_shot_recipe()):
        assert verdicts(raw, capsys) == (0, "")


def test_the_same_costs_without_weights(
    vit_recipe: Make, classifier_recipe: Make, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the forward pass is traced rather than computed."""
    for raw in (vit_recipe(tokens={"keep": 0.7}), classifier_recipe()):
        recipe = validate(raw, Path.cwd())
        told = []
        for most in (10**9, 0):
            monkeypatch.setattr(lookup, "LEAST_TRACED", most)
            monkeypatch.setattr(lookup, "MOST_COMPUTED", most)
            found = preflight(recipe)
            assert found.refusal is None and found.not_checked == []
            told.append([one.detail for one in found.findings if one.name in ("units", "budget")])
        assert told[0] == told[1] and len(told[0]) == 2
    Path("recipe.yaml").write_text(yaml.safe_dump(classifier_recipe()), encoding="utf-8")
    assert cli.main(["recipe.yaml", "--dry-run", "--json"]) == 0
    checks = {one["name"]: one for one in json.loads(capsys.readouterr().out)["checks"]}
    assert checks["units"]["detail"] == "family bert: 3 blocks, 12 heads, 192 neurons"


def test_no_weights_are_read(classifier_recipe: Make) -> None:
    """The weights' numbers are as many bytes of something else: found out by the run alone."""
    raw = classifier_recipe()
    folder = Path("model")
    shutil.copytree(raw["model"]["source"], folder)
    state = load_file(folder / "model.safetensors")
    save_file({name: torch.full_like(value, torch.nan) for name, value in state.items()}, folder / "model.safetensors")
    raw["model"]["source"] = str(folder.absolute())
    found = preflight(validate(raw, Path.cwd()))
    assert found.refusal is None and found.sources is not None
    weights = found.sources.model.state_dict()
    assert all(not value.any() for name, value in weights.items() if name.endswith("dense.weight"))


# --- the run refuses it, and so do they, with the same words --------------------------------------------------------


def test_a_model_that_no_family_knows(
    place: Path, text_data: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its units are measured: by the run on its weights, and before that on random ones, if these are not large."""
    folder = tmp_path / "model"
    folder.mkdir()
    save_small(folder, "DebertaV2ForSequenceClassification", pad_token_id=0)
    raw = of_text(folder, text_data)
    assert verdicts(raw, capsys) == (0, "")
    found = preflight(validate(raw, Path.cwd()))
    (units,) = [one.detail for one in found.findings if one.name == "units"]
    random = "found by measurement on random weights (a run measures again on the real ones)"
    assert units == f"{random}: 3 blocks, 8 heads, 160 neurons" and found.not_checked == []
    flags = ["init", "--model", str(folder), "--data", f"tsv:{text_data / 'classes.tsv'}", "--goal", "macs=0.6"]
    assert cli.main([*flags, "--out", "other.yaml"]) == 0
    assert random in capsys.readouterr().out
    monkeypatch.setattr(structures, "MOST_BYTES", 1000)
    found = preflight(validate(raw, Path.cwd()))
    assert found.refusal is None
    assert found.not_checked == ["units are found by measurement when the run starts: 0.0 GiB of weights"]
    refused = preflight(validate({**raw, "prune": {**raw["prune"], "coupled": True}}, Path.cwd())).wrong
    assert refused is not None and "no residual stream" in refused.what  # families alone declare streams


MIXED = """
import torch

class Mixed(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.pretrained_cfg = {"input_size": (1, 32, 32)}
        self.first, self.second = torch.nn.Linear(64, 16), torch.nn.Linear(16, 5)
    def forward(self, pixel_values):
        hidden = self.first(pixel_values[:, 0].flatten(1)[:, :64]).relu()
        return self.second(hidden / hidden.norm(dim=-1, keepdim=True))

def made():
    return Mixed()
"""


def test_a_model_whose_features_are_all_mixed(vit_recipe: Make, tmp_path: Path, capsys: Capture) -> None:
    file = tmp_path / "mixed.py"
    file.write_text(MIXED, encoding="utf-8")
    raw = vit_recipe()
    raw["model"] = {**raw["model"], "source": f"py:{file}:made", "weights": "random", "args": {}}
    code, error = verdicts(raw, capsys)
    assert code == 2 and "each feature that 'model.second' reads depends on several features of 'model.first'" in error


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"export": {"batch": [1], "sequence": 65}}, "the model has 64 positions"),
        ({"prune": {"budget": {"macs": 0.0001}}}, "no plan meets the budget macs: 0.0001"),
        ({"prune": {"budget": {"macs": 0.6}, "units": ["channels"]}}, "the model has no channels"),
        ({"tokens": {"schedule": [20, 20, 20]}}, "tokens"),
        ({"task": "fill-mask"}, "has no weights for fill-mask"),
        ({"task": "image-classification"}, "cannot load the model"),
        ({"task": "token-classification"}, "has no 'tokens'"),
        ({"columns": {"text": "txt"}}, "has no column 'txt'"),
        ({"evaluation": {"text": "sentence", "label": "sentence"}}, "is not a class of the model"),
    ],
)
def test_refusals_of_text(
    bert_folder: Path, text_data: Path, change: dict[str, Any], says: str, capsys: Capture
) -> None:
    raw = of_text(bert_folder, text_data)
    raw["model"]["task"] = change.pop("task", raw["model"]["task"])
    raw["data"]["calibration"]["columns"] = change.pop("columns", {"text": "sentence"})
    if "evaluation" in change:
        source = raw["data"]["calibration"]["source"]
        raw["data"]["evaluation"] = {"source": source, "columns": change.pop("evaluation"), "metric": "accuracy"}
    raw |= change
    code, error = verdicts(raw, capsys)
    assert code == 2 and says in error


def test_folders_that_are_no_models(bert_folder: Path, text_data: Path, tmp_path: Path, capsys: Capture) -> None:
    def without_weights(folder: Path) -> None:
        (folder / "model.safetensors").unlink()

    def truncated(folder: Path) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-100])

    def of_another_size(folder: Path) -> None:
        change_config(folder, intermediate_size=48)

    def quantised(folder: Path) -> None:
        change_config(folder, quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})

    def of_own_code(folder: Path) -> None:
        change_config(folder, model_type="own", auto_map={"AutoConfig": "own.Config"})

    def without_tokenizer(folder: Path) -> None:
        for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt"):
            (folder / name).unlink(missing_ok=True)

    def an_adapter(folder: Path) -> None:
        (folder / "config.json").rename(folder / "adapter_config.json")

    for spoil, says in (
        (without_weights, "model.safetensors"),
        (truncated, "cannot load the model"),
        (of_another_size, "cannot load the model"),
        (quantised, "are quantised"),
        (of_own_code, "cannot load the model"),
        (without_tokenizer, "cannot load the tokenizer"),
        (an_adapter, "a PEFT adapter"),
    ):
        folder = tmp_path / spoil.__name__
        shutil.copytree(bert_folder, folder)
        spoil(folder)
        code, error = verdicts(of_text(folder, text_data), capsys)
        assert code == 2 and says in error, spoil.__name__


def change_config(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, **fields}), encoding="utf-8")


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("model.args.num_classes", 7, "does not fit the model"),
        ("model.preprocess.size", [16, 16], "does not run on the calibration data"),
        ("model.source", "timm:ghostnet_050", "cannot create the model"),
        ("model.weights", "none.pt", "cannot read the checkpoint"),
        ("data.calibration.source", "npz:none.npz", "No such file"),
    ],
)
def test_refusals_of_images(vit_recipe: Make, path: str, value: Any, says: str, capsys: Capture) -> None:
    raw = json.loads(json.dumps(vit_recipe()))
    section = raw
    *way, last = path.split(".")
    for name in way:
        section = section[name]
    section[last] = value
    code, error = verdicts(raw, capsys)
    assert code == 2 and says in error


def test_a_pickled_checkpoint_is_compared_by_names_and_shapes(
    vit_recipe: Make, vit_checkpoint: Path, tmp_path: Path, capsys: Capture
) -> None:
    state = load_file(vit_checkpoint)
    raw = vit_recipe()
    raw["model"]["weights"] = str(tmp_path / "weights.pt")
    torch.save({"state_dict": state}, tmp_path / "weights.pt")
    assert verdicts(raw, capsys)[0] == 0
    torch.save(
        {"state_dict": {name: value for name, value in state.items() if name != "head.bias"}}, tmp_path / "weights.pt"
    )
    code, error = verdicts(raw, capsys)
    assert code == 2 and "head.bias" in error


# --- the user's own function ----------------------------------------------------------------------------------------

OWN = """
import timm, torch
SMALL = {"img_size": 32, "patch_size": 8, "num_classes": 5, "embed_dim": 32, "depth": 2, "num_heads": 4}
def plain(**args):
    return timm.create_model("vit_tiny_patch16_224", **SMALL)
def computes(**args):
    model = plain()
    assert float(model.head.weight.norm()) > 0  # needs values
    return model
def strange(**args):
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 5))
def fails(**args):
    raise KeyError("no such layer")
def on_meta(**args):
    with torch.device("meta"):
        return plain()
"""


@pytest.mark.parametrize(
    ("function", "says"),
    [
        ("plain", None),
        ("computes", None),
        ("strange", "the model has nothing to prune"),
        ("fails", "no such layer"),
        ("on_meta", "on the meta device"),
        ("none", "has no attribute"),
    ],
)
def test_the_users_own_function(
    vit_recipe: Make, colour_data: Path, tmp_path: Path, function: str, says: str | None, capsys: Capture
) -> None:
    (tmp_path / "own.py").write_text(OWN, encoding="utf-8")
    raw = vit_recipe(data={"calibration": {"source": f"npz:{colour_data / 'images.npz'}"}})
    source = f"py:{tmp_path / 'own.py'}:{function}"
    raw["model"] = {"source": source, "task": "image-classification", "preprocess": {"size": [32, 32]}}
    code, error = verdicts(raw, capsys)
    assert (code, error) == (0, "") if says is None else code == 2 and says in error


def test_a_model_is_built_without_memory_and_has_its_buffers() -> None:
    def make() -> torch.nn.Module:
        model = torch.nn.Sequential(*(torch.nn.Linear(10_000, 10_000) for _ in range(20)), torch.nn.BatchNorm1d(4))
        model.register_parameter("tied", model[0].weight)
        model.register_buffer("places", torch.arange(5))
        return model

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model = built(make, Lookup())  # 8 GB, were it filled
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + 2**20  # KiB
    assert model.tied is model[0].weight and model[0].weight.shape == (10_000, 10_000)
    assert model.places.tolist() == list(range(5)) and model[20].running_var.tolist() == [1.0] * 4


# --- what cannot be checked -----------------------------------------------------------------------------------------


def test_a_model_that_is_not_in_the_cache_is_told_as_not_checked(
    bert_folder: Path, text_data: Path, capsys: Capture
) -> None:
    raw = of_text(bert_folder, text_data)
    raw["model"]["source"] = "hf:no-such-owner/no-such-model"
    Path("recipe.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
    assert cli.main(["recipe.yaml", "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "not checked: model and data: hf:no-such-owner/no-such-model is not in this machine's cache" in told
    assert "the recipe is valid as far as it could be checked" in told
    assert cli.main(["doctor", "recipe.yaml"]) == 0
    assert "some checks were not possible" in capsys.readouterr().out
    raw["data"]["calibration"]["columns"] = {"text": "txt"}  # the data is looked at all the same
    Path("recipe.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
    assert cli.main(["recipe.yaml", "--dry-run"]) == 2
    assert "has no column 'txt'" in capsys.readouterr().err


def test_a_known_model_whose_weights_are_not_in_the_cache(vit_recipe: Make) -> None:
    raw = vit_recipe()
    name = "timm:vit_tiny_patch16_224.augreg_in21k"
    raw["model"] = {**raw["model"], "source": name, "weights": "pretrained"}
    found = preflight(validate(raw, Path.cwd()))
    assert found.refusal is None and f"{name} is not in" in found.not_checked[0]
    assert any(one.name == "units" and one.state == "ok" for one in found.findings)


def test_what_the_machine_lacks_is_told_after_the_plan(vit_recipe: Make, capsys: Capture) -> None:
    raw = vit_recipe(targets=[{"engine": "tensorrt"}])
    Path("recipe.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
    assert cli.main(["recipe.yaml", "--stop-after", "sources", "--quiet"]) == 5
    error = words(capsys.readouterr().err)
    assert cli.main(["recipe.yaml", "--dry-run"]) == 5
    told = capsys.readouterr()
    assert words(told.err) == error and "\n  sources " in told.out and "checked: budget" in told.out
    assert cli.main(["recipe.yaml", "--dry-run", "--json"]) == 5
    assert json.loads(capsys.readouterr().out)["error"]["exit_code"] == 5
    raw["prune"]["budget"]["macs"] = 0.0001  # no other machine would mend that
    Path("recipe.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
    assert cli.main(["recipe.yaml", "--dry-run"]) == 2


# --- init -----------------------------------------------------------------------------------------------------------


def init(*words: str) -> int:
    return cli.main(["init", *words, "--yes", "--force"])


def test_what_init_writes_runs(bert_folder: Path, text_data: Path, capsys: Capture) -> None:
    words = ("--model", str(bert_folder), "--data", f"tsv:{text_data / 'classes.tsv'}", "--goal", "macs=0.5")
    assert init(*words) == 0
    assert "export.sequence is 16" in capsys.readouterr().out
    assert cli.main(["recipe.yaml", "--stop-after", "sources", "--quiet"]) == 0, capsys.readouterr().err


def test_init_says_which_units_stay(tmp_path: Path, colour_data: Path, capsys: Capture) -> None:
    args = "img_size=448, patch_size=56, embed_dim=32, depth=2, num_heads=4, num_classes=5"
    (tmp_path / "own.py").write_text(
        f"import timm\ndef model():\n    return timm.create_model('eva02_base_patch14_448', {args})\n", encoding="utf-8"
    )
    words = ("--model", f"py:{tmp_path / 'own.py'}:model", "--task", "image-classification")
    assert init(*words, "--data", f"npz:{colour_data / 'images.npz'}", "--goal", "macs=0.97") == 0
    told = capsys.readouterr().out
    assert "found by measurement on random weights" in told and "norm across its neurons" in told
    assert cli.main(["recipe.yaml", "--stop-after", "sources", "--quiet"]) == 0


def test_init_writes_no_unreachable_budget(bert_folder: Path, text_data: Path, capsys: Capture) -> None:
    words = ("--model", str(bert_folder), "--data", f"tsv:{text_data / 'classes.tsv'}", "--goal", "macs=0.00001")
    assert init(*words) == 2
    assert "no plan meets the budget macs: 1e-05" in capsys.readouterr().err and not Path("recipe.yaml").exists()


def test_the_length_leaves_the_texts_whole(bert_folder: Path, capsys: Capture) -> None:
    for words, sequence, cut in ((10, 16, 0.0), (40, 48, 0.0), (100, 64, 1.0)):
        rows = "\n".join(["a " * words] * 50)
        Path("rows.csv").write_text(f"text\n{rows}\n", encoding="utf-8")
        told = ("--data", "csv:rows.csv", "--columns", "text=text", "--goal", "macs=0.5", "--json")
        assert init("--model", str(bert_folder), *told) == 0
        written = json.loads(capsys.readouterr().out)
        assert written["content"]["export"]["sequence"] == sequence
        assert any(f"{cut:.1%} of the calibration rows are cut" in note for note in written["notes"])


def test_the_length_is_no_longer_than_the_model_takes(tmp_path: Path, capsys: Capture) -> None:
    """By its own table of positions, of which MPNet and RoBERTa lose some to the padding token."""
    Path("rows.csv").write_text("sentence\n" + "a man is playing the guitar while\n" * 30, encoding="utf-8")
    for name, sequence in (("MPNetModel", 6), ("RobertaModel", 6)):
        folder = tmp_path / name
        folder.mkdir()
        save_small(folder, name, max_position_embeddings=8, pad_token_id=1)
        flags = ("--model", str(folder), "--data", "csv:rows.csv", "--columns", "text=sentence", "--goal", "macs=0.9")
        assert init(*flags, "--json") == 0
        assert json.loads(capsys.readouterr().out)["content"]["export"]["sequence"] == sequence


def test_a_task_is_guessed_from_the_weights_where_no_class_is_named(bert_folder: Path, tmp_path: Path) -> None:
    for name, task in (
        ("BertForSequenceClassification", "text-classification"),
        ("BertForMaskedLM", "fill-mask"),
        ("BertForQuestionAnswering", "question-answering"),
        ("BertModel", "feature-extraction"),
        ("LlamaForCausalLM", "text-generation"),
    ):
        folder = tmp_path / name
        folder.mkdir()
        save_small(folder, name)
        assert task_of(str(folder)) == task
        change_config(folder, architectures=None)
        assert task_of(f"hf:{folder}") == task
    (tmp_path / "modules.json").write_text("[]", encoding="utf-8")
    assert task_of(str(tmp_path)) == "feature-extraction"  # the transformer lies in a folder of its own
    (tmp_path / "config_sentence_transformers.json").write_text('{"model_type": "CrossEncoder"}', encoding="utf-8")
    assert task_of(str(tmp_path)) == "text-classification"


def test_the_lookup_gives_what_loading_gives(classifier_recipe: Make, vit_recipe: Make) -> None:
    for raw in (classifier_recipe(), vit_recipe()):
        recipe = validate(raw, Path.cwd())
        real, empty = load_sources(recipe), load_sources(recipe, Lookup())
        assert real.loaded.architecture == empty.loaded.architecture and real.loaded.labels == empty.loaded.labels
        pairs = zip(real.model.state_dict().items(), empty.model.state_dict().items(), strict=True)
        assert all((name, value.shape, value.dtype) == (n, v.shape, v.dtype) for (name, value), (n, v) in pairs)
        for (name, one), (_, other) in zip(real.model.named_buffers(), empty.model.named_buffers(), strict=True):
            assert np.array_equal(one, other), name
