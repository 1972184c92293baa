"""The cache of steps: by content, and what is damaged is made again and said."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import optin_export
from optin_export import environment
from optin_export.workdir import cache
from optin_export.workdir.cache import StepCache
from optin_export.workdir.files import read_json, sha256_file, sha256_json, write_json, write_text
from tests.conftest import Make


@pytest.fixture
def told() -> list[str]:
    return []


def step(run: Path, told: list[str], inputs: Any = 1) -> tuple[bool, list[str]]:
    """Whether a step that writes out/a.txt was done, and the warnings."""
    book = StepCache(run, False, lambda: None, told.append)

    def work() -> dict[str, Any]:
        write_text(run / "out" / "a.txt", "content")
        return {"found": 1}

    assert book.step("recipe", "one", {"of": inputs}, [run / "out" / "a.txt"], work) == {"found": 1}
    assert (run / "out" / "a.txt").read_text() == "content"
    return book.executed == 1, book.warnings


def test_a_step_is_done_once_and_again_for_other_inputs(tmp_path: Path, told: list[str]) -> None:
    assert step(tmp_path, told) == (True, [])
    assert step(tmp_path, told) == (False, [])
    assert step(tmp_path, told, inputs=2) == (True, [])
    assert told == []  # other inputs are no damage


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("out/a.txt", b"cOntent", "out/a.txt is not what was written"),
        ("out/a.txt", None, "out/a.txt cannot be read (No such file"),
        (".stages/one.json", b"{", ".stages/one.json cannot be read"),
        (".stages/one.json", b"[]", ".stages/one.json cannot be read"),
        (".stages/one.json", b"[" * 100_000, ".stages/one.json cannot be read"),
        (".stages/one.json", b'{"key": 1, "files": 3, "result": {}}', ".stages/one.json cannot be read"),
        (".stages/one.json", b"\xff\xfe", ".stages/one.json cannot be read"),
    ],
)
def test_damage_is_made_good_and_said(tmp_path: Path, told: list[str], name: str, content: Any, says: str) -> None:
    step(tmp_path, told)
    (tmp_path / name).unlink() if content is None else (tmp_path / name).write_bytes(content)
    done, warnings = step(tmp_path, told)
    assert done and warnings == told and len(told) == 1 and says in told[0]
    assert step(tmp_path, []) == (False, [])


def test_a_vanished_record_is_no_damage(tmp_path: Path, told: list[str]) -> None:
    step(tmp_path, told)
    (tmp_path / ".stages" / "one.json").unlink()
    assert step(tmp_path, told) == (True, [])


def test_a_change_of_the_stages_code_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stages are no layer, and decide what is written all the same."""
    before = code_hash("recipe")
    assert code_hash("search") != before
    assert edited_hash(monkeypatch, b"\nEDITED = 1\n") != before


def test_comments_and_docstrings_are_no_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wording must not cost hours of scoring."""
    assert edited_hash(monkeypatch, b"\n# edited\n\n") == code_hash("recipe")
    source = b'def f(x):\n    """Words."""\n    return x\n'
    one, other = (cache.executed_code(text) for text in (source, source.replace(b"Words", b"Other words")))
    assert one == other != cache.executed_code(source.replace(b"return x", b"return -x"))


def code_hash(layer: str) -> str:
    return cache.code_hash.__wrapped__(layer)


def edited_hash(monkeypatch: pytest.MonkeyPatch, text: bytes) -> str:
    """The hash of `recipe` with this text at the end of every file of the stages."""
    known = Path.read_bytes
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", lambda path: known(path) + (text if path.parent.name == "stages" else b""))
        return code_hash("recipe")


@pytest.mark.parametrize(
    "package",
    ["torch", "torch-pruning", "timm", "transformers", "scipy", "onnx", "onnxscript", "onnxruntime"],
)
def test_another_version_of_a_library_that_computes_is_a_change(
    tmp_path: Path, told: list[str], monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    assert step(tmp_path, told) == (True, [])
    known = environment.metadata.version
    monkeypatch.setattr(environment.metadata, "version", lambda name: "0.0.1" if name == package else known(name))
    assert step(tmp_path, told) == (True, [])
    assert step(tmp_path, told) == (False, [])


@pytest.mark.usefixtures("short_measurement")
def test_the_warning_is_in_the_report_and_shown(
    tmp_path: Path, finished_vit: Path, vit_recipe: Make, capsys: Any
) -> None:
    """From the command line: the ONNX file of a finished run is damaged."""
    from optin_export import cli

    run = Path(shutil.copytree(finished_vit, tmp_path / "run"))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(vit_recipe()))
    graph = run / "onnx" / "pruned.onnx"
    good = sha256_file(graph)
    graph.write_bytes(b"\0" + graph.read_bytes()[1:])
    assert cli.main([str(recipe), "--out", str(run)]) in (0, 4)
    assert "warning: onnx/pruned.onnx is not what was written" in capsys.readouterr().err
    report = optin_export.Report.model_validate_json((run / "report.json").read_text())
    damaged = [text for text in report.warnings if "was not what" in text or "is not what" in text]
    assert len(damaged) == 1 and "onnx/pruned.onnx" in damaged[0]
    assert "onnx/pruned.onnx is not what was written" in (run / "report.html").read_text()
    assert sha256_file(graph) == good


def test_other_weights_and_other_code_of_the_model_are_other_inputs(tmp_path: Path, vit_recipe: Make) -> None:
    """The same parameters, computed with otherwise: only the file's content tells."""
    code = tmp_path / "mine.py"
    text = (
        "import timm\n"
        "class Mine(timm.models.vision_transformer.VisionTransformer):\n"
        "    def forward(self, x):\n        return SCALE * super().forward(x)\n"
        "def model():\n"
        "    return Mine(img_size=32, patch_size=8, in_chans=1, num_classes=5, embed_dim=32, depth=2, num_heads=4)\n"
    )
    section = {**vit_recipe()["model"], "source": f"py:{code}:model", "weights": "random", "args": {}}
    recipe, run = vit_recipe(model=section), tmp_path / "run"
    seen = []
    for scale, seed in ((1, 0), (1, 0), (2, 0), (2, 1)):
        code.write_text(f"SCALE = {scale}\n" + text)
        optin_export.run({**recipe, "seed": seed}, run, stop_after="scoring")
        seen.append((run / "scores" / "scores.safetensors").stat().st_mtime_ns)
    assert seen[0] == seen[1] and len(set(seen)) == 3


@dataclass(frozen=True)
class Counted:
    rows: int
    pairs: tuple[tuple[float, float], ...] = ()


def counted(run: Path, told: list[str]) -> tuple[Counted, bool]:
    """The result of a step, and whether it was done."""
    book = StepCache(run, False, lambda: None, told.append)
    return book.step("recipe", "one", {}, [], lambda: Counted(3, ((0.5, 1.0),)), Counted), book.executed == 1


def test_a_typed_result_is_the_same_when_it_is_reused(tmp_path: Path, told: list[str]) -> None:
    assert counted(tmp_path, told) == (Counted(3, ((0.5, 1.0),)), True)
    assert counted(tmp_path, told) == (Counted(3, ((0.5, 1.0),)), False)
    assert told == []


@pytest.mark.parametrize("result", [{"pairs": []}, {"rows": "many"}, {"rows": 1, "pairs": [[1.0]]}, [3], None])
def test_a_record_without_such_a_result_is_made_again(tmp_path: Path, told: list[str], result: Any) -> None:
    """As of another version, or forged: with a hash that fits."""
    counted(tmp_path, told)
    record = tmp_path / ".stages" / "one.json"
    write_json(record, {**read_json(record), "result": result, "sha256": sha256_json(result)})
    assert counted(tmp_path, told) == (Counted(3, ((0.5, 1.0),)), True)
    assert len(told) == 1 and ".stages/one.json cannot be read" in told[0]
