"""What the documentation says is what the code does: schemas, README commands, recipes, names of files."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from optin_export import units
from optin_export.cli.dry_run.work import planned_work
from optin_export.recipe import load_recipe
from optin_export.units import supported
from optin_export.workdir.cache import LAYERS
from optin_export.workdir.run_directory import STAGES
from tests.conftest import ROOT

RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))


def load_tool(name: str):  # type: ignore[no-untyped-def]
    [path] = (ROOT / "tools").rglob(f"{name}.py")
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # as when it is run: scripts import those in the same folder
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def test_published_schemas_are_those_of_the_code() -> None:
    tool = load_tool("make_schemas")
    for name, model in tool.MODELS.items():
        stored = (ROOT / "docs" / "schemas" / f"{name}.schema.json").read_text(encoding="utf-8")
        assert stored == tool.schema_text(model), "run: python tools/make_schemas.py"


def test_the_generated_reference_is_that_of_the_code() -> None:
    tool = load_tool("make_reference")
    pages = tool.pages()
    for name, text in pages.items():
        assert (tool.FOLDER / name).read_text(encoding="utf-8") == text, "run: python tools/make_reference.py"
    assert {path.name for path in tool.FOLDER.iterdir()} == set(pages)


def test_the_site_builds_strictly_and_loads_nothing(tmp_path: Path) -> None:
    """No broken link or anchor, no page left out, and no page that asks another server for anything."""
    pytest.importorskip("mkdocs", reason="the documentation's site needs the extra docs")
    pytest.importorskip("material")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    pages = {path.relative_to(tmp_path).with_suffix("") for path in tmp_path.rglob("*.html")}
    assert pages >= {path.relative_to(ROOT / "docs").with_suffix("") for path in (ROOT / "docs").rglob("*.md")}
    for page in tmp_path.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert not re.findall(r"<(?:script|img|iframe)\b[^>]*\bsrc=\"?(?:https?:)?//[^>]*>", text), page
        assert not re.findall(r"<link\b[^>]*\bhref=\"?(?:https?:)?//[^>]*>", text), page
        assert "mermaid" not in text and "arithmatex" not in text, f"{page} would fetch a script for it"


def test_schemas_accept_what_a_recipe_says() -> None:
    import json

    import jsonschema

    schema = json.loads((ROOT / "docs" / "schemas" / "recipe.schema.json").read_text(encoding="utf-8"))
    for path in RECIPES:
        jsonschema.validate(yaml.safe_load(path.read_text(encoding="utf-8")), schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"recipe": 1, "name": "x", "unknown": 1}, schema)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_validates(path: Path) -> None:
    assert load_recipe(path).name


def test_the_quickstart_has_a_plan_of_work() -> None:
    recipe = load_recipe(ROOT / "recipes" / "quickstart.yaml")
    assert [stage for stage, _ in planned_work(recipe, Path("runs/quickstart"))] == list(STAGES)


def test_ci_calls_exactly_the_commands_of_the_readme() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in ("run", "test"):
        assert len(re.findall(rf"^<!-- command: {name} -->\n```bash\n(.+\n)+```$", readme, re.MULTILINE)) == 1
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "command_of test" in script and "command_of run" in script


def test_the_top_level_is_what_it_should_be() -> None:
    try:
        listed = subprocess.run(
            ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    names = {name.split("/")[0] for name in listed if not name.startswith(".")}
    folders = {"optin_export", "recipes", "tests", "tools", "docs", "docker", "examples", "requirements"}
    files = {"mkdocs.yml", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "MANIFEST.in", "Makefile"}
    assert names == folders | files | {"CONTRIBUTING.md", "SECURITY.md", "CODE_OF_CONDUCT.md", "CITATION.cff"}


def test_the_tables_of_families_are_those_of_the_code_and_the_study(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "_registered", {})  # by other tests of this process
    tool = load_tool("make_families")
    page = tool.PAGE.read_text(encoding="utf-8")
    assert tool.page(page) == page, "run: python tools/make_families.py"
    assert all(f"| `{family.name}` |" in page for family in supported())


def test_architectures_of_any_result_have_their_row() -> None:
    tool = load_tool("make_families")
    row = {"library": "timm", "code": 0, "family": "vit + discovered", "units": {"heads": [4, 2], "channels": [9, 1]}}
    rows = {
        "hybrid": row,
        "plain": {**row, "library": "own", "family": "discovered", "units": {"neurons": [4, 2]}, "floor": 0.791},
        "differs": {**row, "family": "resnet", "check": {"failed": ["base 0.1"]}},
        "refused": {"library": "timm", "code": 2},
        "killed": {"library": "timm", "code": None},
        "not built": {"library": "timm", "unbuilt": "no such class"},
    }
    packages = {"torch": "2.9", "timm": "1.0"}
    table = tool.architecture_table({"budget": 0.6, "environment": {"packages": packages}, "rows": rows})
    assert table[2:] == [
        "| `hybrid` | heads, channels, whole sub-layers | `vit`, measurement | torch 2.9, timm 1.0 | below 0.6 |",
        "| `plain` | neurons | measurement | torch 2.9 | 0.79 |",
        "| `differs` | heads, channels | `resnet` | differs: torch 2.9, timm 1.0 | below 0.6 |",
        "",
        "Not pruned, with the reason in [breadth](breadth.md): `killed`, `refused`.",
    ]


def test_an_empty_place_is_filled_and_a_missing_one_is_an_error() -> None:
    tool = load_tool("render_results")
    text = tool.README.read_text(encoding="utf-8")
    before, _, rest = text.partition("<!-- measured: real -->\n")
    empty = f"{before}<!-- measured: real -->\n<!-- end -->{rest.partition('<!-- end -->')[2]}"
    assert tool.readme(empty) == text
    with pytest.raises(ValueError, match="no place for the numbers of real"):
        tool.readme(text.replace("<!-- measured: real -->", ""))


def test_measured_numbers_are_those_of_the_measurement_files() -> None:
    tool = load_tool("render_results")
    page = tool.PAGE.read_text(encoding="utf-8")
    assert page == tool.page(), "run: python tools/studies/render_results.py"
    assert tool.BREADTH.read_text(encoding="utf-8") == tool.breadth_page(), (
        "run: python tools/studies/render_results.py"
    )
    text = tool.README.read_text(encoding="utf-8")
    assert text == tool.readme(text), "run: python tools/studies/render_results.py"
    for figure in re.findall(r"\]\((figures/[^)]+)\)", page):
        assert (tool.PAGE.parent / figure).is_file(), "run: python tools/studies/render_results.py"


def test_layers_are_the_folders_of_the_package() -> None:
    package = ROOT / "optin_export"
    folders = {path.name for path in package.iterdir() if path.is_dir() and not path.name.startswith("_")}
    assert folders - {"api", "cli", "stages", "distributed", "formats", "tracking", "workdir", "sentence"} == set(
        LAYERS
    )
