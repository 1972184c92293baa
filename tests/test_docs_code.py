"""Every code block of README.md and docs/ does what it says: commands and Python run, on small data and with short
measurements, recipes and gates are read by their loaders. What cannot run here says why, and is parsed all the same."""

from __future__ import annotations

import ast
import contextlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import optin_export
from optin_export import cli
from optin_export.cli._gates import GatesFile
from optin_export.cli._group import COMMANDS, command_of
from optin_export.cli.run import optin_export as command_line
from optin_export.recipe import load_recipe
from optin_export.ship.own_config import check_own
from optin_export.workdir.run_directory import CONTENTS
from tests.conftest import ROOT, Make, sentences
from tests.docs_blocks import OUTPUT, PAGES, REASON, Block, arguments_of, blocks_of, commands_of, is_plain, unfenced
from tests.shortly import SHORTLY, measure_shortly

pytest.importorskip("onnxruntime")

#: Fewer rows and probes than the recipes ask for: what is tested is that the lines work.
SMALL = {"prune.probes": 2, "prune.rows": 64, "prune.score_samples": 8, "prune.allocation": "additive"}
ROWS = {"data.calibration.samples": 16, "data.evaluation.samples": 24}
#: Their verdict is about clocks and accuracy, which short measurements of small data do not decide.
JUDGES = ("check",)
BLOCKS = [block for page in PAGES for block in blocks_of(page)]
RUN = [page for page in PAGES if any(block.runs and block.language in ("bash", "python") for block in blocks_of(page))]
#: A page that prunes a trained model of 22 million parameters twice takes more than ten minutes; what the other shows,
#: tests/test_segmentation.py runs from the same scenes.
LONGEST = ("docs/tutorials/bert.md", "docs/tutorials/segmentation.md")
#: Pages whose blocks take longer than all others together.
LONG = ("docs/tutorials/bert.md", "docs/tutorials/segmentation.md", "docs/tutorials/cnn.md")


def small(recipe: str | Path, given: list[str]) -> list[str]:
    """Overrides that make a run small, without those that the line has itself."""
    whole = load_recipe(recipe, given)
    wanted: dict[str, Any] = dict(SMALL)
    for field, rows in ROWS.items():
        section = getattr(whole.data, field.split(".")[1])
        if section is not None and (section.samples is None or section.samples > rows):
            wanted[field] = rows
    wanted |= {"export.sequence": 16} if whole.is_text and whole.export.sequence > 16 else {}
    wanted |= {"gates.speedup": 0.01} if whole.gates.speedup is not None else {}
    wanted |= {"gates.accuracy_drop": 100} if whole.gates.accuracy_drop is not None else {}
    named = {one.partition("=")[0] for one in given}
    return [f"{field}={value}" for field, value in wanted.items() if field not in named]


def call(words: list[str]) -> None:
    """`optin-export ...` in this process; a run is made small."""
    arguments, streams = arguments_of(words)
    is_run = arguments[0] not in COMMANDS
    if is_run:
        given = command_line.make_context("optin-export", list(arguments)).params
        for one in small(given["recipe"], given["overrides"]):
            arguments += ["--set", one]
    with contextlib.ExitStack() as stack:
        for stream, redirect in (("1", contextlib.redirect_stdout), ("2", contextlib.redirect_stderr)):
            if stream in streams:
                stack.enter_context(redirect(stack.enter_context(streams[stream].open("w", encoding="utf-8"))))
        code = cli.main(arguments)
    budget = load_recipe(given["recipe"], given["overrides"]).prune.budget if is_run else None
    undecided = arguments[0] in JUDGES or (budget is not None and budget.kind == "latency")
    assert code == 0 or (undecided and code == 4), f"{' '.join(words)}: exit code {code}"


@pytest.fixture(scope="session")
def given(tmp_path_factory: pytest.TempPathFactory, bert_folder: Path) -> Path:
    """What pages take for granted: the repository's recipes, a model, tables, and a finished run."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "recipes").symlink_to(ROOT / "recipes")
    (folder / "MODEL").symlink_to(bert_folder)
    for name, rows in (("train.csv", 32), ("dev.csv", 24)):
        lines = [f"{text},{index % 3}" for index, text in enumerate(sentences(rows, rows))]
        (folder / name).write_text("\n".join(["sentence,label", *lines]) + "\n", encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        _measure_shortly(patch)
        patch.chdir(folder)
        call(["optin-export", "recipes/quickstart.yaml", "--quiet"])
    shutil.copytree(folder / "runs" / "quickstart", folder / "RUN")
    shutil.copytree(folder / "runs" / "quickstart", folder / "RUN2")
    return folder


def _measure_shortly(patch: pytest.MonkeyPatch) -> None:
    measure_shortly(patch.setattr)


@pytest.fixture
def place(given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A reader's working directory of their own."""
    folder = tmp_path / "reader"
    shutil.copytree(given, folder, symlinks=True)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["python"])
    _measure_shortly(monkeypatch)
    run = optin_export.run

    def run_small(recipe: Any, *args: Any, overrides: Any = (), **options: Any) -> Any:
        return run(recipe, *args, overrides=[*overrides, *small(recipe, list(overrides))], **options)

    monkeypatch.setattr(optin_export, "run", run_small)
    yield folder


# --- every block is run, or says why not ----------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES)
def test_every_block_is_known_for_what_it_is(page: str) -> None:
    """A block runs, or is marked with a reason that counts; what is no code holds no command."""
    assert not unfenced(page), "fence code, and say its language"
    for block in blocks_of(page):
        assert block.language in ("bash", "python", "yaml", OUTPUT), f"{block.where}: which language?"
        if "not run" in block.marks:
            assert REASON.match(block.marks["not run"]), f"{block.where}: {block.marks['not run']} is no reason"
        if block.language == OUTPUT and not page.startswith("docs/reference/"):
            assert not re.search(r"^[$ ]*(optin-export|pip|python) ", block.text, re.MULTILINE), block.where


def test_most_blocks_run() -> None:
    code = [block for block in BLOCKS if block.language != OUTPUT]
    unrun = [block for block in code if not block.runs]
    assert all({"not run", "command"} & set(block.marks) for block in unrun)
    assert len(code) - len(unrun) >= 42 and len(unrun) <= 20, [block.where for block in unrun]
    assert set(LONG) <= set(RUN)


def marks_of(page: str) -> Any:
    return pytest.mark.nightly if page in LONGEST else pytest.mark.slow if page in LONG else ()


@pytest.mark.parametrize("page", [pytest.param(page, marks=marks_of(page)) for page in RUN])
def test_the_commands_and_python_of_a_page_run(page: str, place: Path) -> None:
    """In their order, in one folder, as somebody would who reads the page from its top."""
    _run_page(page, place, slow=False)


@pytest.mark.slow
@pytest.mark.parametrize("page", sorted({block.page for block in BLOCKS if "slow" in block.marks}))
def test_what_takes_longer_runs_too(page: str, place: Path) -> None:
    _run_page(page, place, slow=True)


def _run_page(page: str, place: Path, slow: bool) -> None:
    blocks = blocks_of(page)
    for block in blocks:
        if block.title is not None:
            (place / block.title).write_text(block.text, encoding="utf-8")
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks:
        if not block.runs or ("slow" in block.marks) > slow:
            continue
        if block.language == "python":
            exec(compile(block.text, block.where, "exec"), names)
        elif block.language == "bash" and is_plain(block):
            for words in commands_of(block.text):
                call(words)
        elif block.language == "bash":
            _shell(block, place)


def _shell(block: Block, place: Path) -> None:
    shim = place / "bin" / "optin-export"
    shim.parent.mkdir(exist_ok=True)
    shim.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m optin_export "$@"\n', encoding="utf-8")
    shim.chmod(0o755)
    environment = {**os.environ, "PATH": f"{shim.parent}:{os.environ['PATH']}", "PYTHONPATH": SHORTLY}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block.text], cwd=place, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{block.where}: {done.stderr}"


# --- what is not run is read ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [one for one in BLOCKS if one.language == "bash"], ids=lambda one: one.where)
def test_a_shell_block_is_shell_and_its_commands_are_ours(block: Block) -> None:
    """Also those that are not run: bash reads the block, the real parsers read the calls."""
    subprocess.run(["bash", "-n"], input=block.text, text=True, check=True)
    assert not re.search(r"pip install (-\S+ )*'?optin[-_]export", block.text), "no index has the package: '.[EXTRA]'"
    for line in block.text.replace("\\\n", " ").splitlines():
        for found in re.findall(r"(?:^|&& |\$\()(optin-export [^;)]*)", line.partition(" #")[0]):
            (words,) = commands_of(found.strip().strip('"'))
            _parse(arguments_of(words)[0])
        for extras in re.findall(r"pip install (?:-e )?'(?:\.|optin-export)\[([\w,]+)\]'", line):
            assert set(extras.split(",")) <= _extras(), block.where


def _extras() -> set[str]:
    import tomllib

    return set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])


def _parse(arguments: list[str]) -> None:
    command_line.make_context("optin-export", list(arguments))


@pytest.mark.parametrize("page", PAGES)
def test_commands_in_running_text_are_ours(page: str) -> None:
    """`optin-export ...` between backticks: words in capitals stand for something, dots for more."""
    text = re.sub(r"^ *```.*?^ *```$", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for line in re.findall(r"`optin-export ([^`]+)`", text):
        ((_, *words),) = commands_of("optin-export " + " ".join(line.split()))
        name = words[0]
        if name in COMMANDS and len(words) > 1 and "..." not in words:
            command = command_of(name)
        elif name in COMMANDS:
            continue
        else:
            assert name.endswith(".yaml") or name.isupper() or name.startswith("-"), f"{page}: {line}"
            command = command_line
        known = {"--help", *(option for parameter in command.params for option in parameter.opts)}
        assert {word for word in words if word.startswith("--")} <= known, f"{page}: {line}"


@pytest.mark.parametrize("block", [one for one in BLOCKS if one.language == "python"], ids=lambda one: one.where)
def test_python_is_python(block: Block) -> None:
    ast.parse(block.text)
    if "file" in block.marks:  # a file of the package, shown whole
        assert block.text == (ROOT / block.marks["file"]).read_text(encoding="utf-8"), f"copy it to {block.where}"


@pytest.mark.parametrize("block", [one for one in BLOCKS if one.language == "yaml"], ids=lambda one: one.where)
def test_yaml_is_what_its_reader_accepts(block: Block, tmp_path: Path) -> None:
    """A recipe, a part of one, gates, a part of config.pbtxt, or a workflow."""
    content = yaml.safe_load(block.text)
    if content is None:
        assert block.text.startswith("# yaml-language-server: $schema=")
    elif "jobs" in content:
        steps = [step for job in content["jobs"].values() for step in job["steps"]]
        lines = [line for step in steps for line in step.get("run", "").splitlines()]
        ours = [line for line in lines if line.startswith("optin-export")]
        assert ours
        for line in ours:
            _parse(arguments_of(commands_of(line)[0])[0])
    elif "dynamic_batching" in content:
        check_own(content, 8)
    elif "gates" in content and not isinstance(content["gates"], dict):
        GatesFile.model_validate(content)
    else:
        base = yaml.safe_load((ROOT / "recipes" / "quickstart.yaml").read_text(encoding="utf-8"))
        whole = content if "recipe" in content else {**base, **content}
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(whole, sort_keys=False), encoding="utf-8")
        assert load_recipe(path).name


# --- the run folder -------------------------------------------------------------------------------------------------


def test_every_file_of_a_run_is_described(finished_vit: Path, vit_recipe: Make, tmp_path: Path) -> None:
    """docs/reference/run-folder.md is written from CONTENTS; a run holds nothing that it does not name."""
    import fnmatch

    run = Path(shutil.copytree(finished_vit, tmp_path / "run"))
    optin_export.run(vit_recipe(ship={"triton": True}), run)
    files = [path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()]
    unknown = [name for name in files if not any(fnmatch.fnmatchcase(name, pattern) for pattern in CONTENTS)]
    assert not unknown
    met = {pattern for pattern in CONTENTS if fnmatch.filter(files, pattern)}
    assert {"scores/scores.safetensors", "onnx/pruned.onnx", "measure/latency.json", "triton/*", ".stages/*"} <= met
