"""What `--dry-run` says about time and memory: measured before, a lower bound, or unknown."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from optin_export import cli, run
from optin_export.cli.dry_run import cost
from optin_export.cli.dry_run.cost import estimate_cost
from optin_export.cli.dry_run.model_size import size_of
from optin_export.data import load_sources
from optin_export.measure import latency
from optin_export.recipe import Recipe, validate
from optin_export.repair import gauss_newton
from optin_export.scoring import sketch
from optin_export.workdir import durations
from optin_export.workdir.run_directory import STAGES
from tests.conftest import Make


@pytest.fixture
def recipe(vit_recipe: Make, tmp_path: Path) -> Recipe:
    return validate(vit_recipe(), tmp_path)


def test_constants_equal_those_of_the_code_that_measures() -> None:
    """They are written twice because the dry run loads no torch."""
    own = (cost.BLOCKS, cost.BLOCK_SECONDS, cost.WARM_UP_SECONDS)
    assert own == (latency.BLOCKS, latency.BLOCK_SECONDS, latency.WARM_UP_SECONDS)
    assert cost.FIRST_PROBES == sketch.CHUNK
    assert cost.GAUSS_NEWTON_PASSES == 2 + 2 * (1 + gauss_newton.PROBES)


def test_the_size_is_read_from_the_weights(recipe: Recipe, bert_recipe: Make, tmp_path: Path) -> None:
    for one in (recipe, validate(bert_recipe(), tmp_path)):
        size = size_of(one)
        model = load_sources(one).model.model
        assert size is not None
        assert abs(size.parameters - sum(p.numel() for p in model.parameters())) < 0.2 * size.parameters
        from optin_export.units import count_macs

        whole = count_macs(load_sources(one).model, load_sources(one).fixed(1))
        assert size.macs is not None and 0.5 * whole < size.macs <= whole  # a lower bound, and no empty one


def test_without_weights_nothing_is_made_up(vit_recipe: Make, tmp_path: Path) -> None:
    raw = vit_recipe()
    raw["model"] |= {"source": "py:model.py:make", "weights": "random", "args": {}}
    found = estimate_cost(validate(raw, tmp_path), tmp_path / "runs" / "x")
    assert found.size is None and found.disk_bytes is None and "not known" in found.summary()
    kinds = {one.stage: one.kind for one in found.stages}
    assert kinds == {stage: "at least" if stage == "measure" else "unknown" for stage in STAGES}
    assert all(one.seconds is None and one.memory_bytes is None for one in found.stages if one.kind == "unknown")
    assert found.external_data is None


def test_a_random_architecture_is_counted_without_its_weights(vit_recipe: Make, tmp_path: Path) -> None:
    raw = vit_recipe()
    raw["model"]["weights"] = "random"
    recipe = validate(raw, tmp_path)
    size = size_of(recipe)
    assert size is not None and size.macs is None
    assert size.parameters == sum(p.numel() for p in load_sources(recipe).model.parameters())
    assert "external data" not in estimate_cost(recipe, tmp_path / "run").summary()
    large = {"vocab_size": 250002, "hidden_size": 1024, "num_hidden_layers": 24, "intermediate_size": 4096}
    large |= {"num_attention_heads": 16, "max_position_embeddings": 514}
    raw["model"] |= {"source": "hf:model_type=xlm-roberta", "task": "text-classification", "args": large}
    raw["model"].pop("preprocess")
    raw["data"] = {"calibration": {"source": "csv:x.csv", "columns": {"text": 0}}}
    found = estimate_cost(validate(raw, tmp_path), tmp_path / "run")
    assert found.size is not None and 559_000_000 < found.size.parameters < 562_000_000
    assert found.external_data and "external data" in found.summary()
    assert found.to_json()["external_data"] is True


@pytest.mark.parametrize("content", [b"", b"\xff" * 100, b"\x02\0\0\0\0\0\0\0[]", b"\x10\0\0\0\0\0\0\0{}"])
def test_damaged_weights_have_no_size(vit_recipe: Make, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.safetensors").write_bytes(content)
    raw = vit_recipe()
    raw["model"]["weights"] = "bad.safetensors"
    assert size_of(validate(raw, tmp_path)) is None


def test_pickled_weights_are_not_opened(vit_recipe: Make, tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(50_000)}, tmp_path / "model.pt")
    raw = vit_recipe()
    raw["model"]["weights"] = "model.pt"
    size = size_of(validate(raw, tmp_path))
    assert size is not None and 50_000 <= size.parameters < 52_000 and size.macs is None


def test_sharded_weights_are_added_up(bert_recipe: Make, bert_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bert"
    shutil.copytree(bert_folder, folder)
    (folder / "model.safetensors").unlink()
    for index in range(2):
        save_file({"x": torch.zeros(3, 5)}, folder / f"model-0000{index + 1}-of-00002.safetensors")
    raw = bert_recipe()
    raw["model"]["source"] = str(folder)
    size = size_of(validate(raw, tmp_path))
    assert size is not None and size.parameters == 30


def test_bounds_grow_with_what_is_asked(vit_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "_macs_per_second", lambda: 1e9)

    def at(stage: str, **sections: object) -> float:
        found = estimate_cost(validate(vit_recipe(**sections), tmp_path), tmp_path / "run")
        return next(one.seconds for one in found.stages if one.stage == stage) or 0.0

    assert at("measure", export={"batch": [1, 2, 3]}) == pytest.approx(3 * at("measure", export={"batch": [1]}))
    budget = {"budget": {"macs": 0.5}, "score_samples": 16}
    assert at("scoring", prune={**budget, "probes": 40}) > 4 * at("scoring", prune={**budget, "probes": 8})
    assert at("surgery", prune={**budget, "compensate": False}) == 0.0
    assert at("surgery", finetune={"steps": 100}) > at("surgery")
    assert at("surgery", prune={**budget, "gauss_newton": True}) > at("surgery")


def test_a_run_leaves_what_the_next_dry_run_knows(
    vit_recipe: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = vit_recipe(prune={"budget": {"macs": 0.6}, "probes": 8, "score_samples": 8, "curve_samples": 8})
    folder = tmp_path / "runs" / "first"
    run(raw, folder, stop_after="search")
    known = durations.recall(folder)
    assert set(known) == {"sources", "scoring", "curves", "search"} and known["scoring"]["peak_bytes"] > 50 * 2**20
    run(raw, folder, stop_after="search")  # all reused: what it took stays known
    assert durations.recall(folder)["scoring"] == known["scoring"]

    recipe = validate(raw, tmp_path)
    by_stage = {one.stage: one for one in estimate_cost(recipe, folder).stages}
    assert by_stage["scoring"].kind == "measured" and by_stage["scoring"].seconds == known["scoring"]["seconds"]
    assert by_stage["surgery"].kind == "at least"  # this run never came so far
    assert "another recipe" not in by_stage["scoring"].basis
    other = validate({**raw, "seed": 3}, tmp_path)
    assert "another recipe" in estimate_cost(other, folder).stages[1].basis
    beside = estimate_cost(other, tmp_path / "runs" / "second").stages[1]
    assert beside.kind == "measured" and "first, another run of this model" in beside.basis

    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
    assert cli.main([str(tmp_path / "recipe.yaml"), "--dry-run", "--json", "--out", str(folder)]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["stages"][1]["estimate"]["seconds"] == known["scoring"]["seconds"]
    assert told["model"]["parameters"] > 0 and told["disk_bytes"] > 0


@pytest.mark.parametrize("content", ["", "[]", "{", '{"scoring": 3}', '{"scoring": {"seconds": "x", "peak_bytes": 1}}'])
def test_a_damaged_history_is_none(tmp_path: Path, content: str) -> None:
    (tmp_path / ".stages").mkdir()
    (tmp_path / durations.NAME).write_text(content, encoding="utf-8")
    assert durations.recall(tmp_path) == {}
    durations.remember(tmp_path, "scoring", 1.5, 1 << 20)
    assert durations.recall(tmp_path)["scoring"]["seconds"] == 1.5
