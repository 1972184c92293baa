"""README.md of an exported folder, a model card: what it is, what was removed, what was measured, how to load it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from optin_export.formats.graph_folder import CLASSES
from optin_export.formats.run import FinishedRun
from optin_export.models import auto_class
from optin_export.ship.origin import UNKNOWN, license_of, without_folders
from optin_export.workdir.files import write_text

_LIBRARIES = {"hf": "transformers", "optimum": "onnx"}


def write_card(run: FinishedRun, folder: Path, format: str) -> None:
    """Write README.md."""
    parts = [_front(run, format), _what(run), _removed(run), _measured(run), _load(run, format)]
    write_text(folder / "README.md", "\n\n".join(parts) + "\n")


def _front(run: FinishedRun, format: str) -> str:
    license_ = _license(run)
    lines = [f"library_name: {_LIBRARIES.get(format, format)}", f"pipeline_tag: {_tag(run, format)}"]
    if (name := _hub_name(run)) is not None:
        lines.append(f"base_model: {name}")
    if license_ != UNKNOWN:
        lines.append(f"license: {license_}")
    return "\n".join(["---", *lines, "tags:", "- pruned", "- onnx", "---"])


def _tag(run: FinishedRun, format: str) -> str:
    return "sentence-similarity" if format == "sentence-transformers" else run.task


def _hub_name(run: FinishedRun) -> str | None:
    prefix, _, name = run.recipe.model.source.partition(":")
    plain = prefix == "hf" and not name.startswith("model_type=") and not Path(name).is_absolute()
    return name if plain else None


def _license(run: FinishedRun) -> str:
    return run.recipe.ship.model_license or license_of(run.recipe.model.source)


def _what(run: FinishedRun) -> str:
    report = run.report
    source = without_folders(run.recipe.model.source)
    sizes = (
        f"{part.ratio:.1%} of its {words}" for words, part in (("MACs", report.macs), ("parameters", report.params))
    )
    passed = "It passed" if report.verdict.passed else "**It did not pass**"
    return (
        f"# {report.name}\n\n{source} ({run.task}), pruned by optin_export without retraining, has "
        f"{' and '.join(sizes)}. {passed} the gates of its recipe.\n\nLicence of the unpruned model: {_license(run)}."
    )


def _removed(run: FinishedRun) -> str:
    kinds: dict[str, list[int]] = {}
    for group in run.report.pruning.groups:
        kept = kinds.setdefault(group.kind, [0, 0])
        kept[0], kept[1] = kept[0] + group.kept, kept[1] + group.count
    rows = [[kind, str(count - kept), f"{kept} of {count}"] for kind, (kept, count) in kinds.items()]
    text = "## What was removed\n\n" + _table(["units", "removed", "kept"], rows)
    merged = sum(run.report.pruning.merged)
    return f"{text}\n\n{merged} tokens are merged in a pass." if merged else text


def _measured(run: FinishedRun) -> str:
    parts = ["## What was measured"]
    found = run.report.accuracy
    if found is None:
        parts.append("No accuracy was measured.")
    else:
        parts.append(
            f"{found.metric} on {found.rows} rows: {found.base:.2f} unpruned, {found.pruned:.2f} pruned; "
            f"drop {found.drop:+.2f} points, 95 % interval {found.drop_low:+.2f} to {found.drop_high:+.2f}."
        )
    rows = [
        [
            one.target,
            str(one.batch),
            f"{one.base_ms.p50:.3g}",
            f"{one.pruned_ms.p50:.3g}",
            f"{one.speedup.median:.2f}x",
            f"{one.speedup.ci_low:.2f} to {one.speedup.ci_high:.2f}",
            f"{one.noise_floor:.1%}",
        ]
        for one in run.report.latency
    ]
    if rows:
        machine = run.report.environment.get("cpu")
        where = f" on {machine}" if isinstance(machine, str) else ""
        head = ["target", "batch", "base p50 ms", "pruned p50 ms", "speedup", "95 % interval", "noise floor"]
        parts.append(f"Latency in {run.report.precision}{where}:\n\n{_table(head, rows)}")
    parts += [f"Warning: {text}" for text in run.report.warnings]
    return "\n\n".join(parts)


def _load(run: FinishedRun, format: str) -> str:
    code = {"hf": _load_hf, "sentence-transformers": _load_sentence, "optimum": _load_optimum, "timm": _load_timm}[
        format
    ]
    text = "\n".join(code(run))
    return f"## Load it\n\n```python\n{text}\n```\n\n`FOLDER` is this folder. {_graph(run, format)}" + (
        "" if format == "optimum" else " The safetensors weights are in fp32."
    )


def _graph(run: FinishedRun, format: str) -> str:
    if run.task == "feature-extraction" and format in ("sentence-transformers", "optimum"):
        return "`onnx/model.onnx` is in fp32 and returns the state of every token, which the library pools."
    return f"`onnx/model.onnx` is the graph that was measured, in {run.report.precision}."


def _load_hf(run: FinishedRun) -> Iterable[str]:
    import transformers

    config = transformers.AutoConfig.for_model(run.base["config"]["model_type"])
    auto = auto_class(config, run.task).__name__
    yield f"from transformers import {auto}"
    yield f'model = {auto}.from_pretrained("FOLDER", trust_remote_code=True)'


def _load_sentence(run: FinishedRun) -> Iterable[str]:
    yield "from sentence_transformers import SentenceTransformer"
    yield 'model = SentenceTransformer("FOLDER", trust_remote_code=True)'
    yield 'embeddings = model.encode(["a text"])'


def _load_optimum(run: FinishedRun) -> Iterable[str]:
    name = CLASSES[run.task]
    options = ", use_cache=False, use_io_binding=False" if run.task == "text-generation" else ""
    yield f"from optimum.onnxruntime import {name}"
    yield f'model = {name}.from_pretrained("FOLDER"{options})'


def _load_timm(run: FinishedRun) -> Iterable[str]:
    yield 'import sys; sys.path.insert(0, "FOLDER")'
    yield "from model import load"
    yield "model = load()"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
