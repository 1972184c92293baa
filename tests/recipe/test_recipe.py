"""The recipe: what is wrong is refused with one clear InputError, and what is right survives a round trip."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from optin_export.errors import InputError
from optin_export.recipe import PruneSection, Recipe, load_recipe, validate
from tests.conftest import ROOT

GOOD: dict[str, Any] = {
    "recipe": 1,
    "name": "demo",
    "model": {"source": "hf:some/encoder", "task": "feature-extraction", "pooling": "mean"},
    "data": {
        "calibration": {"source": "csv:train.csv", "columns": {"text": 0}, "samples": 16},
        "evaluation": {
            "source": "csv:test.csv",
            "columns": {"text": "a", "text_pair": "b", "label": 2},
            "metric": "spearman",
        },
    },
    "prune": {"budget": {"macs": 0.5}},
    "export": {"batch": [1, 8], "sequence": 64},
    "targets": [{"threads": 1}, {"threads": 2}],
    "gates": {"speedup": 1.3, "accuracy_drop": 1.0},
}


def with_value(dotted: str, value: Any) -> dict[str, Any]:
    """GOOD with one field replaced, or added."""
    raw = copy.deepcopy(GOOD)
    *parents, last = dotted.split(".")
    node: Any = raw
    for name in parents:
        node = node[int(name)] if isinstance(node, list) else node.setdefault(name, {})
    node[int(last) if isinstance(node, list) else last] = value
    return raw


def without(dotted: str) -> dict[str, Any]:
    raw = copy.deepcopy(GOOD)
    *parents, last = dotted.split(".")
    node = raw
    for name in parents:
        node = node[name]
    del node[last]
    return raw


def refused(raw: dict[str, Any], folder: Path = Path("/")) -> InputError:
    with pytest.raises(InputError) as caught:
        validate(raw, folder)
    assert str(caught.value).count("\n") == 2 and caught.value.why and caught.value.exit_code == 2
    return caught.value


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write(text: str | bytes) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def test_the_good_recipe_is_good(tmp_path: Path) -> None:
    recipe = validate(GOOD, tmp_path)
    assert recipe.prune.budget.kind == "macs" and recipe.prune.budget.fraction == 0.5
    assert recipe.data.calibration.source == f"csv:{tmp_path / 'train.csv'}"
    assert recipe.is_text


@pytest.mark.parametrize(
    ("dotted", "value", "hint"),
    [
        ("modle", {}, "did you mean 'model'?"),
        ("prune.budget.mac", 0.5, "did you mean 'macs'?"),
        ("targets.0.thread", 1, "targets.0.thread: unknown field (did you mean 'threads'?)"),
        ("data.evaluation.metrics", "spearman", "did you mean 'metric'?"),
        ("model.preprocess.sise", [1, 1], "did you mean 'size'?"),
        ("gates.zzz", 1, "known here: speedup, accuracy_drop"),
    ],
)
def test_an_unknown_field_is_named_with_the_nearest_known_one(dotted: str, value: Any, hint: str) -> None:
    assert hint in refused(with_value(dotted, value)).why


@pytest.mark.parametrize(
    ("dotted", "value", "why"),
    [
        ("recipe", 2, "recipe: should be 1, not 2"),
        ("recipe", True, "recipe: should be a number, not True"),
        ("name", "a/b", "name:"),
        ("name", "../up", "name:"),
        ("name", "", "name:"),
        ("name", 5, "name: should be a valid string, not 5"),
        ("seed", -1, "seed:"),
        ("seed", True, "seed: should be a number"),
        ("seed", 2**70, "seed:"),
        ("model.task", "translation", "model.task:"),
        ("model.args", [1], "model.args:"),
        ("model.args", {"rate": float("nan")}, "finite"),
        ("model", None, "model:"),
        ("model.preprocess", {"std": [0.0]}, "model.preprocess.std.0:"),
        ("model.preprocess", {"mean": []}, "model.preprocess.mean:"),
        ("model.preprocess", {"size": [32]}, "model.preprocess.size.1:"),
        ("data.calibration.samples", 0, "data.calibration.samples:"),
        ("data.calibration.samples", "many", "data.calibration.samples:"),
        ("data.calibration.columns", {"text": -1}, "position from 0, not -1"),
        ("data.calibration.columns", {"text": True}, "position from 0, not True"),
        ("data.calibration.columns", {"text": 0.5}, "position from 0, not 0.5"),
        ("data.calibration.columns", {"words": 0}, "data.calibration.columns.words"),
        ("data.calibration.label_pattern", "(", "should be a regular expression"),
        ("data.calibration.label_pattern", "[0-9]+", "should have a group"),
        ("data.evaluation.metric", "bleu", "data.evaluation.metric:"),
        ("data.evaluation.metric", "accuracy", "for feature-extraction is spearman or pearson"),
        ("prune.gauss_newton", "often", "prune.gauss_newton"),
        ("prune.units", [], "prune.units:"),
        ("prune.units", ["layers"], "prune.units.0:"),
        ("prune.units", ["neurons", "dimensions"], "name heads as well"),
        ("prune", {"budget": {"speedup": 2.0}, "units": ["heads", "dimensions"]}, "not under a budget of speedup"),
        ("prune", {"budget": {"macs": 0.5}, "units": ["heads", "dimensions"], "compensate": False}, "compensate: true"),
        ("prune.budget", {}, "exactly one of: macs, params"),
        ("prune.budget", {"macs": 0.5, "params": 0.5}, "exactly one of: macs, params"),
        ("prune.budget.macs", 0.0, "prune.budget.macs:"),
        ("prune.budget.macs", 1.01, "prune.budget.macs:"),
        ("prune.budget.macs", -0.5, "prune.budget.macs:"),
        ("prune.budget.macs", True, "prune.budget.macs:"),
        ("prune.budget.macs", float("nan"), "prune.budget.macs:"),
        ("prune.align", 0, "prune.align: should be greater than or equal to 1, not 0; prune.align: should be 'auto'"),
        ("prune.align", "automatic", "prune.align: should be 'auto', not 'automatic' (did you mean 'auto'?)"),
        ("prune.probes", 2.5, "prune.probes: should be a valid integer"),
        ("prune.temperature", 0, "prune.temperature:"),
        ("tokens.keep", 0.0, "tokens.keep"),
        ("tokens.keep", "most", "tokens.keep"),
        ("tokens.schedule", [], "tokens.schedule:"),
        ("tokens.schedule", [1, -1], "tokens.schedule.1:"),
        ("tokens.schedule", [True], "tokens.schedule.0:"),
        ("tokens", {"keep": 0.5, "schedule": [1]}, "keep or schedule, not both"),
        ("export.batch", [], "export.batch:"),
        ("export.batch", [1, 1], "the same batch size occurs twice"),
        ("export.batch", [0], "export.batch.0:"),
        ("export.batch", 8, "export.batch:"),
        ("export.precision", "fp4", "export.precision:"),
        ("targets", [], "targets:"),
        ("targets", [{}, {"threads": 1}], "two entries are the same"),
        ("targets", {"threads": 1}, "targets:"),
        ("gates.speedup", 0, "gates.speedup:"),
        ("gates.speedup", True, "gates.speedup:"),
        ("gates.speedup", float("inf"), "gates.speedup:"),
        ("gates.accuracy_drop", float("nan"), "gates.accuracy_drop:"),
        ("ship.triton", "perhaps", "ship.triton:"),
    ],
)
def test_a_wrong_value_is_refused_by_name(dotted: str, value: Any, why: str) -> None:
    assert why in refused(with_value(dotted, value)).why


@pytest.mark.parametrize("dotted", ["recipe", "name", "model", "model.task", "data.calibration", "prune.budget"])
def test_a_missing_field_is_named(dotted: str) -> None:
    assert f"{dotted}: Field required" in refused(without(dotted)).why


def test_fields_that_contradict_each_other_are_refused() -> None:
    assert "needs data.evaluation" in refused(without("data.evaluation")).why
    raw = with_value("model.task", "text-classification")
    raw["data"]["evaluation"]["metric"] = "accuracy"
    assert "model.pooling is only for" in refused(raw).why
    for compensate in (False, "rescale"):
        raw = with_value("prune.compensate", compensate)
        raw["prune"]["gauss_newton"] = True
        assert "needs prune.compensate: true" in refused(raw).why


def test_many_problems_stay_one_short_line() -> None:
    why = refused(with_value("targets", [{"threads": 0}] * 500)).why
    assert "and 495 more" in why and len(why) < 1000


def places(value: Any, prefix: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*prefix, key)
        yield from places(item, (*prefix, key))


ODD: list[Any] = [
    None,
    True,
    -1,
    0,
    1.5,
    float("nan"),
    10**400,
    "",
    " ",
    "\0",
    "~nobody-here/x",
    "x" * 5000,
    "py:",
    "timm:",
    [],
    {},
]
ODD += [[None], {"a": 1}, {1: 2}, {None: None}, [[]], b"x", {"x"}, "\ud800"]


def test_no_odd_value_anywhere_does_more_than_raise_an_input_error(tmp_path: Path) -> None:
    tried = 0
    for place in places(GOOD):
        for odd in ODD:
            raw = copy.deepcopy(GOOD)
            node: Any = raw
            for key in place[:-1]:
                node = node[key]
            node[place[-1]] = odd
            try:
                recipe = validate(raw, tmp_path)
            except InputError as error:
                assert error.why and "\n" not in error.why, (place, odd)
            else:
                assert load_text(tmp_path, recipe.to_yaml()) == recipe, (place, odd)
            tried += 1
    assert tried > 500


def load_text(folder: Path, text: str) -> Recipe:
    path = folder / "again.yaml"
    path.write_text(text, encoding="utf-8")
    return load_recipe(path)


# --- the file -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "top level is not a mapping"),
        (b"- 1\n- 2\n", "top level is not a mapping"),
        (b"just words", "top level is not a mapping"),
        (b"recipe: [1\n", "line"),
        (b"a: b: c\n", "line 1"),
        (b"\xff\xfe\x00recipe", "not UTF-8"),
        (b"recipe: 1\n---\nrecipe: 1\n", "another document"),
        (b"recipe: 1\nname: !!python/object/apply:os.system ['true']\n", "could not determine a constructor"),
        (b"recipe: 1\nname: 2020-13-45\n", "a value cannot be read"),
        (b"recipe: 1\nname: !!int x\n", "a value cannot be read"),
        (b"recipe: 1\nname: a\x00b\n", "special characters"),
        (b"recipe: 1\nrecipe: 1\n", "the key 'recipe' is given twice"),
        (b"recipe: 1\nprune: {budget: {macs: 0.5, macs: 0.6}}\n", "the key 'macs' is given twice"),
        (b"recipe: 1\n? [a, b]\n: 1\n", "unhashable"),
        (b"recipe: 1\nmodel: &m {args: *m}\n", "levels once its aliases"),
        (b"[" * 40_000, "nest"),
        (b"a: " + b"{b: " * 60 + b"1" + b"}" * 60, "50 levels"),
        (b"#" * 300_000, "larger than"),
    ],
)
def test_a_file_that_is_no_recipe(write: Any, content: bytes, reason: str) -> None:
    start = time.monotonic()
    with pytest.raises(InputError) as caught:
        load_recipe(write(content))
    assert reason in caught.value.why.replace("recursion", "nest")
    assert time.monotonic() - start < 60  # a parser that nests or expands without limit takes hours


def test_aliases_that_multiply_are_refused_at_once(write: Any) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    start = time.monotonic()
    with pytest.raises(InputError, match="not a usable YAML"):
        load_recipe(write("\n".join(lines)))
    merged = ["b0: &b0 {k: v}"] + [f"b{i}: &b{i} {{<<: [{', '.join([f'*b{i - 1}'] * 10)}]}}" for i in range(1, 12)]
    with pytest.raises(InputError, match="not a usable YAML"):
        load_recipe(write("\n".join(merged)))
    assert time.monotonic() - start < 60  # a parser that nests or expands without limit takes hours


def test_honest_aliases_work_and_an_override_changes_one_place_only(write: Any) -> None:
    text = """
recipe: 1
name: aliases
model: {source: "hf:x/y", task: text-classification}
data:
  calibration: &table {source: "csv:a.csv", columns: &columns {text: 0, label: 1}}
  evaluation: {<<: *table, metric: accuracy}
prune: {budget: {macs: 0.5}}
"""
    recipe = load_recipe(write(text), ["data.evaluation.columns.label=2"])
    assert recipe.data.evaluation is not None
    assert recipe.data.evaluation.columns["label"] == 2 and recipe.data.calibration.columns["label"] == 1


def test_a_byte_order_mark_is_no_part_of_the_recipe(write: Any) -> None:
    assert load_recipe(write(b"\xef\xbb\xbf" + yaml.safe_dump(GOOD).encode())).name == "demo"


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for path, reason in (
        (tmp_path / "none.yaml", "No such file"),
        (tmp_path, "directory"),
        ("/dev/zero", "regular file"),
    ):
        with pytest.raises(InputError, match=reason):
            load_recipe(path)


def test_round_trip(write: Any, tmp_path: Path) -> None:
    recipe = load_recipe(write(yaml.safe_dump(GOOD)), ["model.args={a: [1, x, null], b: {c: true}}", "seed=7"])
    (tmp_path / "elsewhere").mkdir()
    assert load_text(tmp_path / "elsewhere", recipe.to_yaml()) == recipe


# --- --set ----------------------------------------------------------------------------------------------------------


def test_overrides(write: Any) -> None:
    path = write(yaml.safe_dump({key: value for key, value in GOOD.items() if key not in ("export", "ship")}))
    recipe = load_recipe(
        path,
        [
            "prune.budget.macs=0.25",
            "export.batch=[2, 4]",
            "ship.triton=true",
            "targets.1.threads=4",
            "model.source=hf:other/model",
            "gates.speedup=",
            "prune.budget={params: 0.4}",
        ],
    )
    assert recipe.prune.budget.params == 0.4 and recipe.prune.budget.macs is None
    assert recipe.export.batch == (2, 4) and recipe.ship.triton and recipe.gates.speedup is None
    assert [target.threads for target in recipe.targets] == [1, 4]
    assert recipe.model.source == "hf:other/model"


@pytest.mark.parametrize(
    "override",
    [
        "prune.budget.macs",
        "=1",
        "",
        "targets.7.threads=1",
        "targets.first.threads=1",
        "name.x=1",
        "recipe.x.y=1",
        "prune..budget=1",
        "nosuch.section=1",
        "prune.budget.macs=half",
        "prune.budget.macs=[0.5",
        "model.args={a: 1, a: 2}",
        "data=1",
    ],
)
def test_a_bad_override_is_refused(write: Any, override: str) -> None:
    with pytest.raises(InputError) as caught:
        load_recipe(write(yaml.safe_dump(GOOD)), [override])
    assert caught.value.why


def test_a_deeply_nested_override_is_refused(write: Any) -> None:
    with pytest.raises(InputError):
        load_recipe(write(yaml.safe_dump(GOOD)), ["model.args=" + "[" * 30_000])


# --- sources and paths ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dotted", "source", "why"),
    [
        ("model.source", "hub:x", "none of hf:, timm:, py:"),
        ("model.source", "csv:x.csv", "none of hf:, timm:, py:"),
        ("model.source", "py:model.py", "names no function"),
        ("model.source", "py:model.py:not-a-name", "names no function"),
        ("model.source", "timm:", "names nothing"),
        ("model.source", "", "names nothing"),
        ("model.source", "~nobody-here/model", "home"),
        ("data.calibration.source", "train.csv", "none of csv:, tsv:"),
        ("data.calibration.source", "/data/train.csv", "none of csv:, tsv:"),
        ("data.calibration.source", "sql:x", "none of csv:, tsv:"),
        ("data.calibration.source", "csv:", "names nothing"),
        ("data.calibration.source", "csv:a\0b", "null"),
        ("data.evaluation.source", "py:rows", "names no function"),
    ],
)
def test_a_source_that_names_nothing_known(dotted: str, source: str, why: str) -> None:
    assert why in refused(with_value(dotted, source)).why


def test_paths_are_relative_to_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    folder = tmp_path / "recipes"
    (folder / "encoder").mkdir(parents=True)
    raw = with_value("model.source", "hf:encoder")
    raw["model"] |= {"weights": "w.safetensors", "tokenizer": "encoder"}
    raw["data"]["calibration"]["source"] = "py:rows.py:load"
    raw["data"]["evaluation"]["source"] = "py:package.module:load"
    (folder / "recipe.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
    recipe = load_recipe(folder / "recipe.yaml")
    assert recipe.model.source == f"hf:{folder / 'encoder'}"
    assert recipe.model.weights == str(folder / "w.safetensors")
    assert recipe.model.tokenizer == str(folder / "encoder")
    assert recipe.data.calibration.source == f"py:{folder / 'rows.py'}:load"
    assert recipe.data.evaluation is not None and recipe.data.evaluation.source == "py:package.module:load"


def test_the_entry_of_a_checkpoint_stays_behind_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def weights(given: str) -> str:
        return validate(with_value("model.weights", given), tmp_path / "recipes").model.weights

    (tmp_path / "recipes").mkdir()
    assert weights("last.pth#teacher") == f"{tmp_path}/recipes/last.pth#teacher"
    (tmp_path / "here.pth").touch()
    monkeypatch.chdir(tmp_path)
    assert weights("here.pth#state_dict_ema") == f"{tmp_path}/here.pth#state_dict_ema"
    (tmp_path / "recipes" / "run#3.pth").touch()
    assert weights("run#3.pth") == f"{tmp_path}/recipes/run#3.pth"


def test_hub_names_and_bare_paths(tmp_path: Path) -> None:
    assert validate(with_value("model.source", "hf:a/b"), tmp_path).model.source == "hf:a/b"
    assert validate(with_value("model.source", "timm:vit"), tmp_path).model.source == "timm:vit"
    assert validate(with_value("model.source", "folder/x"), tmp_path).model.source == str(tmp_path / "folder" / "x")


def test_a_path_given_on_the_shell_is_found_from_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here.csv").write_text("x\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    recipe = validate(with_value("data.calibration.source", "csv:here.csv"), tmp_path / "recipes")
    assert recipe.data.calibration.source == f"csv:{tmp_path / 'here.csv'}"


@pytest.mark.parametrize(
    ("export", "target", "reason"),
    [
        ({"precision": "bf16"}, {}, "no bf16 kernels"),
        ({"precision": "int8", "quantization": "dynamic"}, {"engine": "tensorrt"}, "onnxruntime on the CPU"),
        ({"precision": "fp16", "quantization": "dynamic"}, {}, "for precision: int8"),
    ],
)
def test_a_precision_that_its_target_cannot_run_is_refused(
    export: dict[str, Any], target: dict[str, Any], reason: str
) -> None:
    error = refused({**GOOD, "export": {**GOOD["export"], **export}, "targets": [target]})
    assert reason in f"{error.what} {error.why}"


def test_another_quantizer_is_refused_with_the_measurement() -> None:
    error = refused(with_value("export.quantizer", "modelopt"))
    assert "export.quantizer was removed" in error.why and "docs/results.md" in error.why
    title = "Graphs for TensorRT: ours or ModelOpt"
    assert title in error.why and f"## {title}" in (ROOT / "docs" / "results.md").read_text(encoding="utf-8")


def test_recipes_that_name_the_default_quantizer_still_run() -> None:
    recipe = validate(with_value("export.quantizer", "onnxruntime"), Path.cwd())
    assert "quantizer" not in recipe.to_yaml() and recipe == validate(GOOD, Path.cwd())


@pytest.mark.parametrize("score", ["obs", "optin-reference", "fisher", "random"])
def test_a_scorer_that_left_the_recipe_says_where_it_is(score: str) -> None:
    error = refused(with_value("prune.score", score))
    assert f"prune.score: {score} is not in recipes any more" in error.why and error.exit_code == 2
    assert (
        "tools/studies/comparison_scorers.py" in error.why and (ROOT / "tools/studies/comparison_scorers.py").exists()
    )
    assert all(name in error.why for name in get_args(PruneSection.model_fields["score"].annotation))


@pytest.mark.parametrize("rounds", [2, 8, 0, True, "many", None])
def test_more_than_one_round_is_refused_with_the_measurement(rounds: Any) -> None:
    error = refused(with_value("prune.rounds", rounds))
    assert "prune.rounds was removed" in error.why and "no sure gain" in error.why
    assert "## Rounds of score, prune and repair" in (ROOT / "docs" / "results.md").read_text(encoding="utf-8")


def test_one_round_of_an_older_recipe_passes() -> None:
    recipe = validate(with_value("prune.rounds", 1), Path.cwd())
    assert "rounds" not in recipe.to_yaml() and recipe == validate(GOOD, Path.cwd())


CPU, GPU = {"threads": 1}, {"engine": "tensorrt"}
IMAGES = {"source": "timm:vit_tiny_patch16_224", "task": "image-classification"}


@pytest.mark.parametrize(
    ("units", "targets", "images", "narrows"),
    [
        (None, [CPU], True, True),
        (None, [CPU, GPU], True, False),
        (None, [CPU], False, False),
        (["heads", "neurons", "dimensions"], [GPU], True, True),
        (["heads", "neurons", "dimensions"], [CPU], False, True),
        (["heads", "neurons"], [CPU], True, False),
    ],
)
def test_when_queries_and_keys_lose_dimensions(units: Any, targets: Any, images: bool, narrows: bool) -> None:
    raw = with_value("targets", targets)
    if images:
        raw |= {"model": IMAGES, "data": {"calibration": {"source": "images:photos"}}, "gates": {}}
        raw["export"].pop("sequence")
    raw["prune"] |= {} if units is None else {"units": units}
    recipe = validate(raw, Path())
    assert recipe.narrows == narrows
    assert validate(yaml.safe_load(recipe.to_yaml()), Path()).narrows == narrows  # also as a run folder keeps it
