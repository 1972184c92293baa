"""init, explain, schema, completion, and what is said to a misspelt command."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import click
import jsonschema
import pytest
import yaml

from optin_export import cli
from optin_export.cli import init as init_module
from optin_export.cli._first_recipe import parse_goal
from optin_export.cli._group import COMMANDS, ELSEWHERE, PROGRAM, command_of
from optin_export.cli._guess import columns_of, task_of
from optin_export.cli._questions import paths
from optin_export.errors import InputError
from optin_export.recipe import load_recipe
from optin_export.recipe.manual import describe_fields
from tests.conftest import ROOT


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory and no terminal."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    return folder


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    code = cli.main(list(words))
    captured = capsys.readouterr()
    assert code == 2 and captured.out == "" and "Traceback" not in captured.err
    assert [line.partition(":")[0].strip() for line in captured.err.splitlines()] == ["error", "why", "fix"]
    return captured.err


# --- init -----------------------------------------------------------------------------------------------------------


def test_a_recipe_for_images(place: Path, colour_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(colour_data / "images.npz", place / "images.npz")
    words = ["init", "--model", "timm:vit_tiny_patch16_224", "--data", "npz:images.npz", "--goal", "macs=0.5"]
    out = place / "deep" / "recipe.yaml"
    assert cli.main([*words, "--evaluation", "npz:images.npz", "--out", str(out), "--schema"]) == 0
    text = out.read_text(encoding="utf-8")
    recipe = load_recipe(out)
    assert recipe.prune.budget.macs == 0.5 and recipe.model.task == "image-classification"
    assert recipe.data.calibration.source == f"npz:{place / 'images.npz'}"  # found from the recipe's own folder
    assert "source: npz:../images.npz" in text
    assert recipe.data.evaluation is not None
    assert recipe.data.evaluation.columns == {"image": "images", "label": "labels"}
    assert recipe.data.calibration.columns == {"image": "images"}  # calibration reads no labels
    assert recipe.gates.accuracy_drop == 1.0 and recipe.gates.speedup == 1.0
    assert describe_fields()["data.calibration.samples"].description in text
    assert text.startswith("# yaml-language-server: $schema=recipe.schema.json\n")
    schema = json.loads((out.parent / "recipe.schema.json").read_text(encoding="utf-8"))
    jsonschema.validate(yaml.safe_load(text), schema)


def test_a_recipe_for_text_guesses_the_task(
    place: Path, bert_folder: Path, text_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = f"tsv:{text_data / 'classes.tsv'}"
    assert cli.main(["init", "--model", str(bert_folder), "--data", table, "--goal", "speedup=1.5", "--json"]) == 0
    written = json.loads(capsys.readouterr().out)["content"]
    recipe = load_recipe("recipe.yaml")
    assert recipe.model.task == written["model"]["task"] == "text-classification"
    assert recipe.data.calibration.columns == {"text": "sentence"}
    assert recipe.data.evaluation is None and recipe.gates.accuracy_drop is None
    assert recipe.gates.speedup == recipe.prune.budget.speedup == 1.5
    assert written["export"]["sequence"] == recipe.export.sequence == 16  # as its texts need
    assert "# evaluation: held-out" in Path("recipe.yaml").read_text(encoding="utf-8")


def test_init_overwrites_nothing_and_writes_nothing_invalid(
    place: Path, colour_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, model = f"npz:{colour_data / 'images.npz'}", "timm:vit_tiny_patch16_224"
    words = ["init", "--model", model, "--data", data, "--goal"]
    for wrong, says in (
        (["macs=2"], "prune.budget.macs"),
        (["macs=0.5", "--batch", "0"], "different whole numbers"),
        (["macs=0.5", "--gates", "speedup"], "cannot read the limit"),
        (["macs"], "write macs=0.5"),
        (["mac=0.5"], "the goals are"),
        (["macs=x"], "could not convert"),
        (["accuracy_drop=1"], "needs data.evaluation"),
        (["macs=0.5", "--target", "onnxrutime"], "targets"),
        (["macs=0.5", "--task", "image-clasification"], "the tasks are"),
        (["macs=0.5", "--columns", "image"], "NAME=PLACE"),
        (["macs=0.5", "--data", "npz:none.npz"], "No such file"),
        (["macs=0.5", "--weights", "none.pt"], "cannot read the checkpoint"),
    ):
        assert says in refused(capsys, *words, *wrong)
        assert list(place.iterdir()) == []
    assert cli.main([*words, "macs=0.5"]) == 0
    capsys.readouterr()
    before = Path("recipe.yaml").read_text(encoding="utf-8")
    assert "recipe.yaml exists" in refused(capsys, *words, "macs=0.25")
    assert Path("recipe.yaml").read_text(encoding="utf-8") == before
    assert cli.main([*words, "macs=0.25", "--force"]) == 0
    assert load_recipe("recipe.yaml").prune.budget.macs == 0.25


def test_without_a_terminal_init_names_the_flags_that_are_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "missing: --model, --task, --data, --goal" in refused(capsys, "init")
    assert "does not say what its task is" in refused(capsys, "init", "--model", "hf:none", "--data", "csv:x", "--yes")
    monkeypatch.setattr(sys, "stdin", None)  # closed
    assert "missing: --model" in refused(capsys, "init")


def ask(*answers: str) -> io.StringIO:
    stream = io.StringIO("".join(f"{answer}\n" for answer in answers))
    stream.isatty = lambda: True  # type: ignore[method-assign]
    return stream


def test_on_a_terminal_init_asks(
    place: Path, colour_data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two answers are needed; the others have defaults."""
    shutil.copy(colour_data / "images.npz", place / "images.npz")
    answers = ("", "timm:vit_tiny_patch16_224", "npz:images.npz", "", "", "", "", "")
    monkeypatch.setattr(sys, "stdin", ask(*answers))
    assert cli.main(["init"]) == 0
    asked = capsys.readouterr().err
    assert "task: image-classification, by the model's configuration" in asked
    assert "  2  auto  (the fastest of onnxruntime and OpenVINO on the CPU)" in asked
    recipe = load_recipe("recipe.yaml")
    assert recipe.model.task == "image-classification" and recipe.data.evaluation is None
    assert recipe.prune.budget.macs == 0.5 and recipe.export.batch == (1, 8)
    assert recipe.targets[0].name == "onnxruntime-cpu-1t" and recipe.gates.speedup == 1.0
    monkeypatch.setattr(sys, "stdin", ask("timm:vit_tiny_patch16_224"))
    assert cli.main(["init", "--out", "other.yaml"]) == 2
    assert "the input ended" in capsys.readouterr().err and not Path("other.yaml").exists()


def test_an_answer_that_cannot_be_used_is_asked_for_again(
    place: Path, text_data: Path, bert_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(bert_folder, place / "minilm")
    rows = "review,stars\n" + "".join(f"a b c {number},{number % 2}\n" for number in range(8))
    (place / "rows.csv").write_text(rows, encoding="utf-8")
    for name in ("odd.csv", "odd2.csv"):
        (place / name).write_text(rows.replace("review,stars", "r,s"), encoding="utf-8")
    wrong = {
        "minilmm": "did you mean minilm?",
        "minilm": None,
        "rows.csv": "write e.g. csv:rows.csv",
        "csv:row.csv": "did you mean rows.csv?",
        "csv:odd.csv": "cannot find the column 'text'",
        "text": "'text' is not NAME=PLACE",
        "text=none": "has no column none",
        "text=r": None,
        "csv:odd2.csv": "cannot find the column 'text'",
        "text=r,label=s": None,
        "half": "50% is macs=0.5",
        "2x": None,
        "onnx": "engine",
        "6": None,
        "1,1": "different whole numbers",
        "4": None,
        "speed=2": "the gates are speedup",
        "speedup=1.5x,accuracy_drop=2": None,
    }
    monkeypatch.setattr(sys, "stdin", ask(*wrong))
    written = place / "recipe.yaml"
    monkeypatch.setattr(init_module, "_fitted", lambda raw, folder: [])
    assert cli.main(["init", "--task", "text-classification"]) == 0
    asked = capsys.readouterr().err
    for answer, says in wrong.items():
        assert says is None or says in asked, answer
    recipe = load_recipe(written)
    assert recipe.data.calibration.columns == {"text": "r"}
    assert recipe.data.evaluation is not None
    assert recipe.data.evaluation.columns == {"text": "r", "label": "s"}
    assert recipe.prune.budget.speedup == 2.0 and recipe.export.batch == (4,)
    assert recipe.targets[0].engine == "torch"
    assert recipe.gates.speedup == 1.5 and recipe.gates.accuracy_drop == 2.0


@pytest.mark.parametrize(
    ("text", "goal"),
    [
        ("50%", ("macs", 0.5)),
        ("macs=50%", ("macs", 0.5)),
        ("params = 25 %".replace(" ", ""), ("params", 0.25)),
        ("2x", ("speedup", 2.0)),
        ("speedup=1.5x", ("speedup", 1.5)),
        ("latency_ms=5ms", ("latency_ms", 5.0)),
        ("accuracy_drop=0.5", ("accuracy_drop", 0.5)),
    ],
)
def test_goals_as_people_write_them(text: str, goal: tuple[str, float]) -> None:
    assert parse_goal(text) == goal


@pytest.mark.parametrize("text", ["50", "x", "%", "150%", "macs=nan", "speedup=-1x", "latency_ms=inf", "0x"])
def test_goals_that_mean_nothing(text: str) -> None:
    with pytest.raises(InputError, match="cannot read the goal"):
        parse_goal(text)


def test_tab_completes_paths_behind_their_prefix(place: Path) -> None:
    (place / "data").mkdir()
    (place / "data" / "rows.csv").touch()
    (place / "dates[1].csv").touch()
    assert paths("da") == ["data/", "dates[1].csv"]
    assert paths("csv:data/r") == ["csv:data/rows.csv"]
    assert paths("csv:dates[") == ["csv:dates[1].csv"]
    assert paths("csv:nothing") == []


def test_guesses(bert_folder: Path, clip_folder: Path, tmp_path: Path) -> None:
    assert task_of(str(bert_folder)) == task_of(f"hf:{bert_folder}") == "text-classification"
    assert task_of(str(clip_folder)) == "zero-shot-image-classification"
    assert task_of("timm:resnet18") == "image-classification"
    for content in ("{", "[]", '{"architectures": 3}', '{"architectures": ["Strange"]}', '{"architectures": []}'):
        (tmp_path / "config.json").write_text(content, encoding="utf-8")
        assert task_of(str(tmp_path)) is None
    (tmp_path / "bad.npz").write_bytes(b"no zip")
    assert columns_of(f"npz:{tmp_path / 'bad.npz'}", "image-classification", True) == {}
    assert columns_of("csv:/none", "text-classification", True) == {}


# --- explain, schema ------------------------------------------------------------------------------------------------


def test_explain_lists_and_explains(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["explain"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert listed == list(describe_fields())
    assert cli.main(["explain", "prune.budget"]) == 0
    assert "prune.budget.latency_ms" in capsys.readouterr().out
    assert cli.main(["explain", "magnitude"]) == 0
    assert capsys.readouterr().out.startswith("prune.score: ")
    assert cli.main(["explain", "export.precision", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["choices"] == ["fp32", "fp16", "bf16", "int8", "fp8"] and told["default"] == "fp32"
    assert cli.main(["explain", "exit-codes"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [*"012345", "130", "143"]


def test_explain_says_what_may_have_been_meant(capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean prune.budget" in refused(capsys, "explain", "prune.bugdet")
    told = refused(capsys, "explain", "batch")
    assert "several fields" in told and "export.batch" in told and "prune.budget.batch" in told
    assert "lists all fields" in refused(capsys, "explain", "qqqq")


def test_the_schema_is_the_published_one(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("recipe", "gates"):
        assert cli.main(["schema", name]) == 0
        published = ROOT / "docs" / "schemas" / f"{name}.schema.json"
        assert capsys.readouterr().out == published.read_text(encoding="utf-8")


# --- misspelt commands ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "meant"),
    [("famlies", "families"), ("Ship", "ship"), ("explian", "explain"), ("docter", "doctor"), ("chek", "check")],
)
def test_a_misspelt_command(word: str, meant: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"did you mean `optin-export {meant}`" in refused(capsys, word)
    assert f"did you mean `optin-export {meant}`" in refused(capsys, word, "--no-such-option")


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("prune", "use optin-export RECIPE.yaml"),
        ("sweep", "explain sweep"),
        ("benchmark", "use optin-export measure RUN"),
        ("deploy", "use optin-export ship RUN --to"),
        ("help", "use optin-export --help"),
        ("recipe", "new here? optin-export init"),
    ],
)
def test_a_first_word_that_is_nothing_here(
    word: str, says: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert says in refused(capsys, word, "anything")


def test_no_argument_at_all_is_told_where_to_begin(capsys: pytest.CaptureFixture[str]) -> None:
    """The exit code is that of a wrong command line: `optin-export $RECIPE` with nothing in it passes no gate."""
    assert cli.main([]) == 2
    captured = capsys.readouterr()
    assert "new here? optin-export init" in captured.err and captured.out == ""
    assert all(f"{name}" in captured.err for name in COMMANDS)
    assert max(map(len, captured.err.splitlines())) <= 110


def test_suggested_commands_exist() -> None:
    for fix in ELSEWHERE.values():
        word = fix.split()[1]
        assert word in COMMANDS or word.startswith(("RECIPE.yaml", "--"))


def test_a_command_that_was_removed(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "rm -r runs/NAME" in refused(capsys, "clean", "runs/x", "--everything")
    (place / "clean").write_text("recipe: 1\n", encoding="utf-8")
    assert "the recipe is not valid" in refused(capsys, "clean")


# --- help -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_a_command(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = command_of(name)
    assert command is not None and command.name == name
    assert cli.main(["-h"]) == 0
    whole = capsys.readouterr().out
    summary = command.get_short_help_str(100)
    assert f"  {name:<12}  {summary}\n" in whole, "one line on a terminal of 80 columns"
    for words in ([name, "--help"], [name, "-h"]):
        assert cli.main(words) == 0
        text = capsys.readouterr().out
        assert text.startswith(f"Usage: optin-export {name} ") and summary in " ".join(text.split())
        assert all(option in text for parameter in command.params for option in parameter.opts if option[0] == "-")
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help is not None and parameter.help.endswith(".") and parameter.help[:1] != " "


def test_help_after_a_completion_in_the_same_process() -> None:
    """Both ask click for the help option, and the first answer is kept."""
    from click.shell_completion import ShellComplete
    from click.testing import CliRunner

    from optin_export.cli.run import optin_export

    made = optin_export.make_context("optin-export", [], resilient_parsing=True)
    assert made.help_option_names == ["-h", "--help"]
    ShellComplete(optin_export, {}, "optin-export", "_COMPLETE").get_completions([], "--")
    assert CliRunner().invoke(optin_export, ["--help"]).exit_code == 0
    assert cli.main(["-h"]) == 0


def test_the_names_of_files_do_not_hide_options(capsys: pytest.CaptureFixture[str]) -> None:
    """Options may stand before the recipe."""
    assert "cannot read the recipe none.yaml" in refused(capsys, "--dry-run", "-q", "none.yaml", "--set", "seed=1")
    assert "Missing argument 'RECIPE'" in refused(capsys, "--dry-run")
    assert "Got unexpected extra argument (b.yaml)" in refused(capsys, "a.yaml", "b.yaml")


def test_a_wrong_command_line_is_refused_by_the_command_that_it_names(capsys: pytest.CaptureFixture[str]) -> None:
    for words, says in (
        (["serve", "run", "--ports", "1", "2"], "requires 3 arguments"),
        (["ship", "run"], "Missing option '--to'"),
        (["check", "run", "--gats", "x"], "Did you mean '--gates'?"),
        (["schema", "x"], "'x' is not one of 'recipe', 'gates'"),
        (["client", "a:1", "--rate", "inf"], "is not in the range"),
    ):
        error = refused(capsys, *words)
        assert says in error and f"see optin-export {words[0]} --help" in error


def test_a_file_that_is_called_nearly_like_a_command_is_a_recipe(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "famlies").write_text("recipe: 1\n", encoding="utf-8")
    assert "the recipe is not valid" in refused(capsys, "famlies")
    assert "cannot read the recipe famlies.yaml" in refused(capsys, "famlies.yaml")


# --- completion -----------------------------------------------------------------------------------------------------


@pytest.fixture
def installed(tmp_path: Path) -> str:
    """A PATH on which this package is installed as a command."""
    folder = tmp_path / "bin"
    folder.mkdir()
    program = folder / PROGRAM
    lines = [f"#!{sys.executable}", "import sys", f"sys.path.insert(0, {str(ROOT)!r})"]
    program.write_text("\n".join([*lines, "from optin_export.cli import main", "sys.exit(main())", ""]))
    program.chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_a_real_bash_completes(place: Path, installed: str) -> None:
    """An interactive bash on a pseudo-terminal: commands, options, values, fields, and recipes by their files."""
    (place / "my_recipe.yaml").write_text("", encoding="utf-8")
    process, terminal = pty.fork()
    if process == 0:
        os.environ.update({"PS1": "$ ", "TERM": "dumb", "PATH": installed, "HISTFILE": "/dev/null"})
        os.execvp("bash", ["bash", "--norc", "--noprofile", "-i"])

    def send(keys: str, until: str) -> str:
        os.write(terminal, keys.encode())
        seen, end = "", time.monotonic() + 60
        while until not in seen and time.monotonic() < end:
            if select.select([terminal], [], [], 0.2)[0]:
                seen += os.read(terminal, 65536).decode(errors="replace").replace("\a", "")
        return seen

    try:
        command = 'eval "$(optin-export completion bash)"; echo re""ady\n'
        assert "ready" in send(command, "ready")
        for typed, whole in (
            ("fam\t", "families"),
            ("my_rec\t", "my_recipe.yaml"),
            ("recipe.yaml --stop-after sco\t", "scoring"),
            ("explain prune.bud\t", "prune.budget"),
            ("completion fi\t", "fish"),
            ("check . --gat\t", "--gates"),
        ):
            assert whole in send(f"\x15optin-export {typed}", whole)
    finally:
        os.close(terminal)
        os.waitpid(process, 0)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ([""], [*COMMANDS]),
        (["sch"], ["schema"]),
        (["--st"], ["--stop-after"]),
        (["recipe.yaml", "--stop-after", "s"], ["scoring", "search", "surgery", "ship", "sources"]),
        (["--quiet", "recipe.yaml", "--ver"], ["--verbose", "--version"]),
        (["explain", "prune.budget.m"], ["prune.budget.macs"]),
        (["explain", "exit"], ["exit-codes"]),
        (["check", "run", "--ju"], ["--junit"]),
        (["completion", "z"], ["zsh"]),
        (["recipe.yaml", "sch"], []),
    ],
    ids=lambda value: " ".join(value) or "nothing",
)
def test_what_a_shell_is_offered(
    shell: str,
    typed: list[str],
    offered: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As the scripts ask: bash and zsh number the word, fish repeats it."""
    monkeypatch.setenv("_OPTIN_EXPORT_COMPLETE", f"{shell}_complete")
    monkeypatch.setenv("COMP_WORDS", " ".join([PROGRAM, *typed]))
    monkeypatch.setenv("COMP_CWORD", typed[-1] if shell == "fish" else str(len(typed)))
    assert cli.main([]) == 0
    found = re.findall(r"^plain[,\n]([^\t\n]*)", capsys.readouterr().out, re.MULTILINE)
    assert sorted(found) == sorted(offered)


def test_files_are_offered_where_files_belong(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("_OPTIN_EXPORT_COMPLETE", "bash_complete")
    for words in ("my_rec", "verify r", "check run --gates g", "recipe.yaml --out r", "init --out r"):
        monkeypatch.setenv("COMP_WORDS", f"{PROGRAM} {words}")
        monkeypatch.setenv("COMP_CWORD", str(len(words.split())))
        assert cli.main([]) == 0
        assert capsys.readouterr().out.splitlines() == [f"file,{words.split()[-1]}"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_finds_no_fault_in_its_script(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell}")
    assert cli.main(["completion", shell]) == 0
    done = subprocess.run([shell, "-n"], input=capsys.readouterr().out, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(shutil.which("fish") is None, reason="no fish")
def test_a_real_fish_completes(
    place: Path, installed: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["completion", "fish"]) == 0
    monkeypatch.setenv("PATH", installed)
    (place / "script.fish").write_text(capsys.readouterr().out, encoding="utf-8")
    for typed, whole in (
        ("fam", "families"),
        ("recipe.yaml --stop-after sco", "scoring"),
        ("explain prune.bud", "prune.budget"),
        ("completion zs", "zsh"),
        ("check . --gat", "--gates"),
    ):
        asked = f"source {place}/script.fish; complete -C 'optin-export {typed}'"
        done = subprocess.run(["fish", "--no-config", "-c", asked], capture_output=True, text=True, check=True)
        assert whole in [line.split("\t")[0] for line in done.stdout.splitlines()], typed


@pytest.mark.skipif(shutil.which("zsh") is None, reason="no zsh")
def test_a_real_zsh_finds_the_function_by_itself(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As a file of $fpath it is registered for the command and loads; what it then offers is not tried here."""
    assert cli.main(["completion", "zsh"]) == 0
    (place / "_optin-export").write_text(capsys.readouterr().out, encoding="utf-8")
    asked = (
        f"fpath=({place} $fpath); autoload -Uz compinit; compinit -u -d {place}/dump; print $_comps[optin-export]; "
        "autoload +X _optin-export; print $+functions[_optin-export]"
    )
    done = subprocess.run(["zsh", "-f", "-c", asked], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["_optin-export", "1"] and done.stderr == ""


# --- docs -----------------------------------------------------------------------------------------------------------


def test_the_pages_say_what_works() -> None:
    """The table of flags holds flags of init; that the page's commands run, tests/test_docs_code.py sees to."""
    page = (ROOT / "docs" / "first-steps.md").read_text(encoding="utf-8")
    init = command_of("init")
    assert init is not None
    options = {option for parameter in init.params for option in parameter.opts}
    named = set(re.findall(r"`(--[a-z-]+)", page.partition("| flag |")[2].partition("\n\n")[0]))
    assert named and named <= options
