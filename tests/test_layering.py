"""The layout: packages import from earlier ones only, heavy packages load lazily, modules stay small."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import optin_export
from optin_export.workdir.cache import LAYERS

PACKAGE = Path(optin_export.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
#: Optional packages, and the file each may be imported in, inside a function; onnxruntime is two tools in one.
LAZY = {
    # What runs in the server's own Python is another place.
    "onnxruntime": {
        "engines/onnxruntime.py",
        "export/quantize.py",
        "ship/served/onnxruntime_model.py",
        "ship/load_alone.py",
    },
    "openvino": {"engines/openvino.py", "export/nncf.py", "ship/served/openvino_model.py", "ship/load_alone.py"},
    "nncf": {"export/nncf.py"},
    "tritonclient": {"ship/protobuf.py", "serving/bounded_http.py"},
    "model_signing": {"ship/signing.py"},
    "tokenizers": {"ship/preprocess.py", "ship/served/text_model.py", "models/sentence_tokens.py"},
    "datasets": {"data/readers.py"},
    "soundfile": {"data/recordings.py"},
    "pynvml": {"measure/gpu.py"},
    "tensorrt": set(),
    "tensorrt_rtx": set(),
    "accelerate": {"models/placement.py"},
    "mlflow": {"tracking/to_mlflow.py"},
    "wandb": {"tracking/to_wandb.py"},
    "ray": {"distributed/ray_session.py"},
}


def imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.lineno, node.module
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def layer_of(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == "optin_export" and len(parts) > 1 and parts[1] in LAYERS else None


def against_the_order(layer: str, source: str) -> list[str]:
    order = {name: index for index, name in enumerate(LAYERS)}
    return [
        f"line {line}: {layer} imports {other}"
        for line, module in imported(ast.parse(source))
        if (other := layer_of(module)) is not None and order[other] > order[layer]
    ]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(PACKAGE).as_posix())
def test_imports_follow_the_order(file: Path) -> None:
    layer = file.relative_to(PACKAGE).with_suffix("").parts[0]
    if layer in LAYERS:
        assert against_the_order(layer, file.read_text(encoding="utf-8")) == []


def test_an_import_against_the_order_is_found() -> None:
    assert against_the_order("search", "from optin_export import engines")
    assert against_the_order("search", "def f():\n    import optin_export.pruning.rebuild")
    assert not against_the_order("repair", "from optin_export.search import Plan")


def test_only_entry_points_import_layers_from_outside() -> None:
    """Other modules serve all layers (errors, files, progress ...) and import none of them but the recipe."""
    for file in [*PACKAGE.glob("[!_]*.py"), *(PACKAGE / "workdir").glob("*.py")]:
        layers = {layer_of(module) for _, module in imported(ast.parse(file.read_text(encoding="utf-8")))}
        assert layers <= {None, "recipe"}, f"{file.name} imports {layers}"


def test_nothing_but_the_package_itself_imports_its_public_api() -> None:
    for file in FILES:
        names = {name for _, name in imported(ast.parse(file.read_text(encoding="utf-8")))}
        inside = file.is_relative_to(PACKAGE / "api") or file == PACKAGE / "__init__.py"
        assert inside or not any(f"{name}.".startswith("optin_export.api.") for name in names), file.name


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(PACKAGE).as_posix())
def test_optional_packages_are_imported_lazily_in_one_file(file: Path) -> None:
    name = file.relative_to(PACKAGE).as_posix()
    tree = ast.parse(file.read_text(encoding="utf-8"))
    top_level = {module.split(".")[0] for node in tree.body for _, module in imported(node) if not _is_guard(node)}
    anywhere = {module.split(".")[0] for _, module in imported(tree)}
    for package, files in LAZY.items():
        assert package not in {module for module in top_level if not _is_function_only(tree, module)}
        assert package not in anywhere or name in files, f"{name} imports {package}"


def _is_guard(node: ast.stmt) -> bool:
    return isinstance(node, ast.FunctionDef | ast.ClassDef | ast.If)


def _is_function_only(tree: ast.Module, module: str) -> bool:
    plain = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    return all(module != name.split(".")[0] for node in plain for _, name in imported(node))


def test_hooks_are_attached_in_one_place() -> None:
    """`units/capture.py` removes them again; two files of `models` complete loaded modules of a library, one of
    `formats` runs in exported folders."""
    allowed = {"units/capture.py", "models/adapt.py", "models/equivalents/caches.py", "formats/runtime.py"}
    names = ("register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook")
    found = {
        file.relative_to(PACKAGE).as_posix()
        for file in FILES
        if any(f".{name}(" in file.read_text(encoding="utf-8") for name in names)
    }
    assert found == allowed


def test_modules_stay_small() -> None:
    long = {file.name: lines for file in FILES if (lines := file.read_text(encoding="utf-8").count("\n")) > 400}
    assert long == {}
