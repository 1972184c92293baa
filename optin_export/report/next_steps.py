"""What to do after a run: exact commands, for every way in which it can end."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from optin_export.recipe.tasks import TEXT_TASKS
from optin_export.workdir.files import read_json

if TYPE_CHECKING:
    from optin_export.report.schema import GateResult, Report

PROGRAM = "optin-export"
#: The class with which transformers loads a model of the task.
_CLASSES = {
    "text-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "fill-mask": "AutoModelForMaskedLM",
    "text-generation": "AutoModelForCausalLM",
    "image-classification": "AutoModelForImageClassification",
    "image-segmentation": "AutoModelForSemanticSegmentation",
    "object-detection": "AutoModelForObjectDetection",
    "depth-estimation": "AutoModelForDepthEstimation",
    "audio-classification": "AutoModelForAudioClassification",
    "automatic-speech-recognition": "AutoModelForCTC",
}


@dataclass(frozen=True)
class Command:
    """The command line of a run. out: its --out; None: the default."""

    recipe: str
    out: Path | None = None
    overrides: Sequence[str] = ()

    def __str__(self) -> str:
        return self.adding()

    def adding(self, *words: str) -> str:
        """The command with further words."""
        out = () if self.out is None else ("--out", str(self.out))
        sets = [word for override in self.overrides for word in ("--set", override)]
        return shlex.join([PROGRAM, self.recipe, *out, *sets, *words])

    def setting(self, field: str, value: object) -> str:
        """The command with another value of a field."""
        others = tuple(one for one in self.overrides if one.partition("=")[0] != field)
        return Command(self.recipe, self.out, others).adding("--set", f"{field}={value}")


def next_steps(report: Report, folder: Path, command: Command) -> list[str]:
    """Commands with the reason for each; first what the run's outcome asks for.

    command: of the run that ended.
    """
    missed = [gate for gate in report.verdict.gates if not gate.passed]
    if not missed and report.quick:
        return [f"{command}   (a full measurement, before you rely on this one)"]
    if not missed:
        format = format_of(folder)
        if format is None:
            return []
        return [f"{PROGRAM} export {shlex.quote(str(folder))} --format {format}   (loads without optin_export)"]
    parity = [gate for gate in missed if gate.kind == "parity"]
    if parity:
        return [_after_parity(parity[0], report, command)]
    steps = []
    if any(gate.measured is None and "other work" in gate.note for gate in missed):
        steps.append(f"stop the other work on this machine, then: {command.adding('--redo', 'measure')}")
    slow = any(gate.measured is not None and "speedup" in gate.name for gate in missed)
    lossy = any(gate.measured is not None and gate.name.startswith("accuracy_drop") for gate in missed)
    macs = report.pruning.budget.get("macs")
    if macs is not None and slow and lossy:
        field = "prune.budget.macs"
        values = ", ".join(f"{one:g}" for one in (round((1 + macs) / 2, 2), macs, round(0.7 * macs, 2)))
        sweep = Command(command.recipe, None, command.overrides).setting("sweep", f"{{{field}: [{values}]}}")
        steps.append(f"{sweep}   (no budget may meet both limits: shows what each costs)")
    elif macs is not None and slow:
        less = command.setting("prune.budget.macs", f"{0.7 * macs:.2g}")
        steps.append(f"{less}   (removes more)")
    elif macs is not None and lossy:
        more = command.setting("prune.budget.macs", f"{(1 + macs) / 2:.2g}")
        steps.append(f"{more}   (removes less; more calibration rows also help: data.calibration.samples)")
    return steps or [f"{PROGRAM} explain gates   (what each limit means; the report says what was measured)"]


def _after_parity(gate: GateResult, report: Report, command: Command) -> str:
    if gate.name != "parity" and report.precision != "fp32":
        other = command.setting("export.precision", "fp32")
        return f"{other}   ({report.precision} changes this model's outputs too much)"
    return f"{PROGRAM} doctor {shlex.quote(command.recipe)}   (an engine computes something else than torch)"


def format_of(folder: Path) -> str | None:
    """The format in which the library of the run's model loads it; None where no library can."""
    try:
        architecture = read_json(folder / "model" / "architecture.json")
        base = architecture["base"]
        if "tower" in base or "encoder" in base or any(architecture["merged"]):
            return None
        if base["task"] == "feature-extraction" and base["library"] == "transformers":
            return "sentence-transformers"
        return {"transformers": "hf", "timm": "timm"}.get(base["library"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


# --- the box of the report ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """What a reader of the report may want to do. code: commands or Python, to be run in the run folder."""

    title: str
    code: str
    note: str = ""


def steps_of(report: Report, run: Path) -> list[Step]:
    """What comes after this run: load the result, serve it, make it smaller; or what to change after a missed gate."""
    again = Command("recipe.yaml", Path("../again"))
    outcome = next_steps(report, Path(), again)
    found = []
    if not report.verdict.passed or report.quick:
        title = "Measure it fully" if report.verdict.passed else "Meet the limits"
        found += [Step(title, *_split(step)) for step in outcome]
    found += _loading(report, run)
    if report.verdict.passed:
        serve = f"{PROGRAM} ship . --to ../models\n{PROGRAM} serve ."
        found.append(Step("Serve it", serve, "a model repository for Triton; a Triton server on this machine"))
    macs = report.pruning.budget.get("macs")
    smaller = []
    if macs is not None:
        smaller.append(Command("recipe.yaml", Path("../smaller")).setting("prune.budget.macs", f"{0.7 * macs:.2g}"))
    if report.precision == "fp32":
        smaller.append(Command("recipe.yaml", Path("../int8"), _form(report)).setting("export.precision", "int8"))
    if smaller:
        note = "fewer units; the same units with 8 bit weights and activations" if len(smaller) > 1 else ""
        found.append(Step("Make it smaller", "\n".join(smaller), note))
    return found


def _form(report: Report) -> tuple[str, ...]:
    """The form of int8 for onnxruntime on a CPU alone; the default, `static`, is for GPUs as well.

    A server's onnxruntime on a CPU runs a part of `static` in fp32.
    """
    if not all(engine.target.startswith("onnxruntime-cpu") for engine in report.engines):
        return ()
    is_text = report.model.get("task") in TEXT_TASKS
    return (f"export.quantization={'dynamic' if is_text else 'static-u8'}",)


def _split(step: str) -> tuple[str, str]:
    """A line of `next_steps` as code and note."""
    before, _, reason = step.partition("   (")
    advice, _, code = before.rpartition("then: ")
    return code, (reason.removesuffix(")") or advice.rstrip(", "))


def _loading(report: Report, run: Path) -> list[Step]:
    format, task = format_of(run), report.model.get("task", "")
    loads = {
        "hf": f"from transformers import {_CLASSES.get(task, 'AutoModel')}\n\n"
        f'model = {_CLASSES.get(task, "AutoModel")}.from_pretrained("../small", trust_remote_code=True)',
        "sentence-transformers": "from sentence_transformers import SentenceTransformer\n\n"
        'model = SentenceTransformer("../small", trust_remote_code=True)',
        "timm": 'import sys\n\nsys.path.insert(0, "../small")\nfrom model import load\n\nmodel = load()',
    }
    found = []
    if format is not None:
        code = f"{PROGRAM} export . --format {format} --to ../small"
        library = {"hf": "transformers", "timm": "timm"}.get(format, format)
        found.append(Step(f"Load it in {library}", code, "writes a folder that needs optin_export no more; then"))
        found.append(Step("", loads[format]))
    name = "pruned" if report.precision == "fp32" else f"pruned.{report.precision}"
    found.append(Step("Load it in torch", 'import optin_export\n\nmodel = optin_export.load_model("model")'))
    if (run / "onnx" / f"{name}.onnx").is_file():
        session = (
            "import onnxruntime\n\n"
            f'session = onnxruntime.InferenceSession("onnx/{name}.onnx")\n'
            "print([(one.name, one.shape) for one in session.get_inputs()])"
        )
        found.append(Step("Load it in onnxruntime", session, "inputs are made by what is in preprocess/"))
    return found
