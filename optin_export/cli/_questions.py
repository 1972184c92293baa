"""The questions of `init` on a terminal: each answer is checked at once, and asked for again until it can be used."""

from __future__ import annotations

import difflib
import glob
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import click

from optin_export.errors import InputError

#: What can be asked, in this order: the question. Only the first two have no default.
QUESTIONS = {
    "model": "Model: a folder, hf:ID, timm:NAME or py:FILE.py:FUNCTION",
    "task": "Task of the model",
    "data": "Calibration data, labels not needed: csv:FILE, tsv:FILE, npz:FILE, images:FOLDER, wav:FOLDER or "
    "hf-dataset:NAME",
    "evaluation": "Held-out, labelled data for the accuracy (empty: accuracy is not measured)",
    "goal": "Goal: 50% (of the MACs stay), 2x (faster), or macs=, params=, speedup=, latency_ms=, accuracy_drop=",
    "target": "Where it will run",
    "batch": "Batch sizes that it will serve",
    "gates": "Limits; if one is missed, nothing ships",
}
#: Asked only for a table whose first line names no column that the task knows.
COLUMNS = "Columns, by name or position from 0: e.g. text=review,label=1"
#: The usual targets, by what `--target` takes.
TARGETS = {
    "onnxruntime": "onnxruntime on the CPU",
    "auto": "the fastest of onnxruntime and OpenVINO on the CPU",
    "openvino": "OpenVINO on the CPU",
    "tensorrt": "TensorRT on a GPU",
    "engine=onnxruntime,device=cuda": "onnxruntime on a GPU",
    "torch": "torch on the CPU",
}
#: Prefixes of sources that name a file or a folder.
FILES, FOLDERS = ("csv", "tsv", "npz"), ("images", "wav")
Check = Callable[[str], object]


def ask(name: str, default: str | None, check: Check, choices: Mapping[str, str] | None = None) -> str:
    """The first answer that `check` accepts.

    Args:
        default: the value of an empty answer, shown in the prompt; None: an answer is required.
        check: raises InputError for an answer that cannot be used.
        choices: answers -> their meaning, as a menu: an answer is one of them or its number.

    Raises:
        InputError: the input ended.
    """
    listed = list(choices or ())
    for number, choice in enumerate(listed, 1):
        meaning = (choices or {})[choice]
        click.echo(f"  {number}  {choice}{f'  ({meaning})' if meaning else ''}", err=True)
    while True:
        answer = _prompt(QUESTIONS.get(name, COLUMNS), default).strip()
        if answer.isdigit() and 1 <= int(answer) <= len(listed):
            answer = listed[int(answer) - 1]
        try:
            check(answer)
            return answer
        except InputError as error:
            click.echo(f"  {error.what}: {error.why}; {error.fix}", err=True)


def _prompt(question: str, default: str | None) -> str:
    try:
        answer: str = click.prompt(question, default, show_default=bool(default), err=True)
        return answer
    except click.Abort as error:
        if isinstance(error.__context__, KeyboardInterrupt):
            raise error.__context__ from None
        raise InputError(
            "cannot write a recipe yet", "the input ended before the last answer", "give options instead"
        ) from None


# --- checks ---------------------------------------------------------------------------------------------------------


def check_model(source: str) -> None:
    """Raises InputError for a source that surely is no model; neither weights nor the network are looked at."""
    prefix, colon, rest = source.partition(":")
    if prefix == "py" and colon:
        file = rest.rpartition(":")[0]
        if file.endswith(".py") and not Path(file).expanduser().is_file():
            raise InputError(f"no file {file}", "nothing has this name", "correct the path")
    elif prefix == "timm" and colon:
        _check_timm(rest)
    elif not colon and not Path(source).expanduser().is_dir():
        if Path(source).expanduser().is_file():
            raise InputError(f"{source} is a file", "a model is a folder", "name its folder; --weights takes files")
        fix = f"{_near(source)}correct the path, or write hf:{source} for a model of the hub"
        raise InputError(f"no folder {source}", "nothing has this name", fix)


def _check_timm(name: str) -> None:
    import timm

    base = name.partition(".")[0]
    if not timm.is_model(base):
        near = difflib.get_close_matches(base, timm.list_models(), n=3)
        why = f"did you mean {', '.join(near)}?" if near else "it is not in timm.list_models()"
        raise InputError(f"timm has no model {base}", why, "correct the name")


def check_data(source: str) -> None:
    """Raises InputError for data that are not there."""
    prefix, colon, path = source.partition(":")
    known = (*FILES, *FOLDERS, "hf-dataset", "py")
    if not colon or prefix not in known:
        kind = Path(source).suffix.removeprefix(".")
        meant = f"{kind}:{source}" if kind in FILES else f"{known[0]}:{source}"
        raise InputError(f"'{source}' has no kind", f"the kinds are {', '.join(known)}", f"write e.g. {meant}")
    place = Path(path).expanduser()
    if prefix in FILES and not place.is_file():
        raise InputError(f"no file {path}", "nothing has this name", f"{_near(path)}correct the path")
    if prefix in FOLDERS and not place.is_dir():
        raise InputError(f"no folder {path}", "nothing has this name", f"{_near(path)}correct the path")


def check_one_of(choices: Sequence[str], answer: str) -> None:
    if answer not in choices:
        near = difflib.get_close_matches(answer, choices, n=1)
        fix = f"did you mean {near[0]}?" if near else "answer with a number or a name"
        raise InputError(f"'{answer}' is not one of them", f"there are {len(choices)}", fix)


def parse_batches(text: str) -> list[int]:
    """'1,8' as numbers. Raises InputError."""
    try:
        found = [int(part) for part in text.replace(" ", ",").split(",") if part]
    except ValueError:
        found = []
    if not found or min(found) < 1 or len(set(found)) != len(found):
        raise InputError(f"cannot read the batch sizes '{text:.60}'", "they are different whole numbers", "write 1,8")
    return found


def _near(path: str) -> str:
    """'did you mean X?, ' if a file nearby has nearly this name."""
    place = Path(path).expanduser()
    try:
        names = [one.name for one in place.parent.iterdir()]
    except OSError:
        return ""
    near = difflib.get_close_matches(place.name, names, n=1, cutoff=0.6)
    return f"did you mean {place.parent / near[0]}? " if near else ""


# --- completion -----------------------------------------------------------------------------------------------------


@contextmanager
def completed_paths() -> Iterator[None]:
    """In this block, Tab completes paths, also behind a prefix such as csv: (where Python has readline)."""
    try:
        import readline
    except ImportError:
        yield
        return
    before = readline.get_completer(), readline.get_completer_delims()
    readline.set_completer_delims(" \t\n")
    readline.set_completer(lambda text, state: (*paths(text), None)[min(state, len(paths(text)))])
    editline = "libedit" in (readline.__doc__ or "")
    readline.parse_and_bind("bind ^I rl_complete" if editline else "tab: complete")
    try:
        yield
    finally:
        readline.set_completer(before[0])
        readline.set_completer_delims(before[1])


def paths(text: str) -> list[str]:
    """Files and folders that begin like the text, with its prefix; folders end with a slash."""
    prefix, colon, rest = text.partition(":")
    if not colon or prefix not in (*FILES, *FOLDERS, "hf", "py"):
        prefix, colon, rest = "", "", text
    beginning = str(Path(rest).expanduser()) + ("/" if rest.endswith("/") else "") if rest else ""
    found = sorted(map(Path, glob.glob(f"{glob.escape(beginning)}*")))  # noqa: PTH207 (Path.glob needs a folder)
    return [f"{prefix}{colon}{path}{'/' if path.is_dir() else ''}" for path in found]
