"""A user's first hour: `init` at a terminal, the run that it proposes, and the result in the libraries they know."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import sys
import termios
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from optin_export import cli
from optin_export.cli._questions import QUESTIONS
from tests import sentence_folders
from tests.conftest import sentences
from tests.shortly import SHORTLY
from tests.textmodels import save_small

#: Answers that have to be typed; at every other question Enter takes the default.
MOST_ANSWERS = 6
#: Fewer probes than the recipe asks for, which `init` leaves at their defaults.
SMALL = ("prune.probes=2", "prune.rows=64", "prune.score_samples=8", "prune.allocation=additive")
TEXTS = sentences(6, 9)


@dataclass(frozen=True)
class Case:
    """answers: what is typed, by the name of the question; load: how the card's model answers TEXTS, as `got`."""

    format: str
    answers: dict[str, str]
    load: str


CASES = {
    "classifier": Case(
        "hf",
        # The accuracy of random weights on random labels and the time of a tiny model decide nothing.
        {
            "model": "mine",
            "data": "tsv:train.tsv",
            "evaluation": "tsv:dev.tsv",
            "gates": "speedup=0.01,accuracy_drop=100",
        },
        "from transformers import AutoTokenizer\n"
        'batch = AutoTokenizer.from_pretrained("FOLDER")(TEXTS, padding=True, return_tensors="pt")\n'
        "with torch.no_grad(): got = model(**batch).logits.numpy()\n",
    ),
    "encoder": Case(
        "sentence-transformers",
        {"model": "mine", "data": "tsv:train.tsv", "gates": "speedup=0.01"},
        "batch, got = model.tokenize(TEXTS), model.encode(TEXTS)\n",
    ),
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """train.tsv and dev.tsv as SST-2 is distributed: `sentence<TAB>label`, label 0 or 1."""
    for name, rows in (("train", 64), ("dev", 40)):
        lines = [f"{text}\t{index % 2}" for index, text in enumerate(sentences(rows, rows))]
        (tmp_path / f"{name}.tsv").write_text("\n".join(["sentence\tlabel", *lines]) + "\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def own_model(case: str, folder: Path) -> None:
    """A user's model, as its library saves it."""
    if case == "encoder":
        from sentence_transformers.sentence_transformer import modules

        bert = sentence_folders.bert(folder.with_name("bert"))
        sentence_folders.build(folder, bert, [modules.Pooling(32, pooling_mode="mean")])
        return
    folder.mkdir()
    save_small(folder, "BertForSequenceClassification", num_labels=2)


def answered(words: list[str], answers: dict[str, str]) -> tuple[list[str], str]:
    """Answer the questions of a command on a pseudo-terminal: by `answers`, or with Enter.

    Returns the names of the questions in the order in which they were asked, and all that was printed.
    """
    main, side = pty.openpty()
    termios.tcsetwinsize(side, (40, 400))  # no question is broken into lines
    environment = {**os.environ, "PYTHONPATH": SHORTLY, "TERM": "xterm"}
    command = [sys.executable, "-m", "optin_export", *words]
    process = subprocess.Popen(command, stdin=side, stdout=side, stderr=side, env=environment)
    os.close(side)
    asked: list[str] = []
    printed = new = ""
    while True:
        if not select.select([main], [], [], 60)[0]:
            process.kill()
            pytest.fail(f"nothing more is printed after: {printed}")
        try:
            part = os.read(main, 4096).decode(errors="replace")
        except OSError:  # the other end was closed
            break
        printed, new = printed + part, new + part
        for name, question in QUESTIONS.items():
            if re.search(rf"{re.escape(question)}( \[.*\])?: $", new):
                asked.append(name)
                new = ""
                os.write(main, f"{answers.get(name, '')}\n".encode())
    os.close(main)
    assert process.wait() == 0, printed
    return asked, printed


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("short_measurement")
def test_init_run_and_load_with_a_model_of_ones_own(case: str, place: Path) -> None:
    wanted = CASES[case]
    own_model(case, place / "mine")
    asked, printed = answered(["init"], wanted.answers)
    assert len(asked) == len(set(asked)), f"a question was asked again: {printed}"
    assert set(wanted.answers) <= set(asked) and len(wanted.answers) <= MOST_ANSWERS
    assert "next: optin-export recipe.yaml" in printed

    assert cli.main(["recipe.yaml", "--quiet", *(word for one in SMALL for word in ("--set", one))]) == 0
    (run,) = (place / "runs").iterdir()
    assert cli.main(["export", str(run), "--format", wanted.format, "--to", "small"]) == 0

    rows = load_file(run / "measure" / "reference.safetensors")
    inputs = {name.removeprefix("input."): value for name, value in rows.items() if name.startswith("input.")}
    np.savez("rows.npz", **{name: value.numpy() for name, value in inputs.items()})
    found = _loaded(wanted, run)
    torch.testing.assert_close(torch.from_numpy(found["rows"]), rows["output.pruned"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found["got"], found["onnx"], rtol=1e-4, atol=1e-5)
    assert np.ptp(found["got"], axis=0).max() > 0.01, "different texts give different outputs"


def _loaded(case: Case, run: Path) -> dict[str, np.ndarray]:
    """What the exported model and the run's graph give, in a process that cannot import this package.

    `got`, `onnx`: of TEXTS, by the library and by onnxruntime; `rows`: of the run's own inputs, by onnxruntime.
    """
    card = Path("small/README.md").read_text(encoding="utf-8")
    lines = card.partition("```python\n")[2].partition("```")[0]
    graph = "small/onnx/model.onnx" if case.format == "hf" else str(run / "onnx" / "pruned.onnx")
    script = (
        f"import sys; sys.modules['optin_export'] = None\nimport numpy, torch\nTEXTS = {TEXTS!r}\n{lines}\n{case.load}"
        "import onnxruntime\n"
        f"session = onnxruntime.InferenceSession({graph!r})\n"
        "names = [one.name for one in session.get_inputs()]\n"
        "(onnx,) = session.run(None, {name: batch[name].numpy() for name in names})\n"
        "(rows,) = session.run(None, dict(numpy.load('rows.npz')))\n"
        "numpy.savez('found.npz', got=got, onnx=onnx, rows=rows)\n"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", re.sub("FOLDER", "small", script)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    with np.load("found.npz") as found:
        return dict(found)
