"""tools/studies as a folder: its README names every result, and its commands start from the root with no PYTHONPATH."""

from __future__ import annotations

import os
import re
import subprocess
import sys

from tests.conftest import ROOT

FOLDER = ROOT / "tools" / "studies"
README = (FOLDER / "README.md").read_text(encoding="utf-8")


def test_the_readme_names_every_result_and_only_scripts_that_exist() -> None:
    results = ROOT / "docs" / "measurements"
    for path in results.rglob("*.json"):
        named = f"`{path.stem}" if path.parent in (results, results / "accuracy") else f"{path.name}`"
        precision = re.fullmatch(r"(\w+)_(?:int8|fp8|fp16|bf16)", path.stem)
        named = f"`{precision.group(1)} --precision" if precision else named
        assert named in README, f"tools/studies/README.md does not say how {path.name} is measured again"
    scripts = set(re.findall(r"`(?:python )?(?:tools/studies/)?(\w+\.py)", README))
    assert scripts and all((FOLDER / name).is_file() for name in scripts - {"study_rounds.py"}), scripts


def test_commands_find_their_siblings_from_the_root() -> None:
    """Siblings are found beside the script; the package here is the one under test, as it would be when installed."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = f"import sys, runpy; sys.path.append({str(ROOT)!r}); sys.argv[1:] = ['--help']; "
    for name in ("benchmark_scale", "study_joint"):
        script = f"tools/studies/{name}.py"
        code = f"{command}sys.path[0] = 'tools/studies'; runpy.run_path({script!r}, run_name='__main__')"
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0 and "usage:" in done.stdout, done.stderr
