"""What is released: wheel and sdist, what they hold and that they install; locked versions, licences, the changelog."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import optin_export
from tests.conftest import ROOT
from tests.test_docs import load_tool

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
#: Folders of results, caches and built things: nothing of them belongs into a release.
JUNK = {"runs", "build", "__pycache__", ".git", ".hypothesis", ".mypy_cache", ".pytest_cache", ".ruff_cache", "shared"}


def requirements(*extras: str) -> list[Requirement]:
    lines = [*PROJECT["dependencies"], *(line for extra in extras for line in PROJECT["optional-dependencies"][extra])]
    return [Requirement(line) for line in lines]


def test_the_lock_holds_every_direct_dependency_in_an_allowed_version() -> None:
    text = (ROOT / "requirements" / "dev.lock").read_text(encoding="utf-8")
    assert "://" not in text and "--" not in text  # no place that packages come from
    locked = dict(re.findall(r"^([a-z0-9-]+)(?:\[.+\])?==([^\s;]+)", text, re.MULTILINE))
    assert len(locked) == len(text.splitlines()), "lines that pin nothing"
    for needed in requirements("cpu", "triton", "test"):
        version = locked.get(canonicalize_name(needed.name))
        assert version is not None, f"{needed.name} is not locked: run tools/lock.sh"
        assert needed.specifier.contains(version, prereleases=True), f"{needed} but {version}: run tools/lock.sh"


def test_the_page_of_licences_names_every_direct_dependency() -> None:
    tool = load_tool("make_licences")
    page = tool.PAGE.read_text(encoding="utf-8")
    assert page.startswith(tool.HEAD), "run: python tools/make_licences.py"
    rows = re.findall(r"^\| ([a-z0-9-]+) \| (.+?) \| (.+?) \|$", page, re.MULTILINE)
    listed = {name: needed for name, _, needed in rows}
    absent = set(re.findall(r"`([a-z0-9-]+)`", page.rpartition("Not installed:")[2]))
    for name, needed in tool.direct().items():
        assert listed.get(name) == needed or name in absent, f"{name}: run python tools/make_licences.py"
    always = {canonicalize_name(one.name) for one in requirements()}
    assert not always & absent


def test_versions_and_the_changelog_follow_semantic_versioning() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert "Semantic versioning" in text.splitlines()[2]
    titles = re.findall(r"^## (.+)$", text, re.MULTILINE)
    found = [re.fullmatch(r"(\d+\.\d+\.\d+) \((unreleased|\d{4}-\d\d-\d\d)\)", title) for title in titles]
    assert titles and all(found), titles
    versions = [Version(one[1]) for one in found if one]
    assert versions == sorted(set(versions), reverse=True)
    assert [one[2] == "unreleased" for one in found[1:] if one] == [False] * (len(found) - 1)
    assert str(versions[0]) == optin_export.__version__


@pytest.mark.parametrize("kind", ["cpu", "gpu"])
def test_dockerfiles_copy_what_the_build_context_has_and_name_extras_that_exist(kind: str) -> None:
    text = (ROOT / "docker" / f"Dockerfile.{kind}").read_text(encoding="utf-8")
    allowed = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    for line in re.findall(r"^COPY (.+)$", text, re.MULTILINE):
        for name in line.split()[:-1]:
            assert (ROOT / name).exists() and f"!{name}" in allowed, name
    (extras,) = re.findall(r"/src\[([\w,]+)\]", text)
    assert set(extras.split(",")) <= set(PROJECT["optional-dependencies"])
    if (hadolint := shutil.which("hadolint")) is not None:
        subprocess.run([hadolint, str(ROOT / "docker" / f"Dockerfile.{kind}")], check=True)


@pytest.mark.slow
def test_wheel_and_sdist_build_install_and_run(tmp_path: Path) -> None:
    pytest.importorskip("build", reason="pip install build")
    pytest.importorskip("setuptools", minversion="77", reason="pip install 'setuptools>=77'")
    # A copy of what git knows: what lies about in a working tree must not be needed.
    source = tmp_path / "source"
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    if not names:
        pytest.skip("not a git checkout")
    for name in filter(None, names.split("\0")):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    line = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path / "dist"), str(source)]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:] + done.stdout[-2000:]
    (wheel,), (sdist,) = (tmp_path / "dist").glob("*.whl"), (tmp_path / "dist").glob("*.tar.gz")

    package = ROOT / "optin_export"
    wanted = {
        f"optin_export/{path.relative_to(package)}"
        for path in package.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert held == wanted and "optin_export/py.typed" in held
    with tarfile.open(sdist) as archive:
        inside = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    assert wanted <= inside and {"tests/conftest.py", "tests/test_packaging.py", "LICENSE", "README.md"} <= inside
    assert not [name for name in inside if JUNK & set(Path(name).parts) or name.endswith((".pyc", ".onnx", ".plan"))]

    # Into a fresh environment that sees this one's packages by a .pth file: nothing large is installed again.
    place = tmp_path / "venv"
    venv.create(place, with_pip=False)
    site = next((place / "lib").glob("python*/site-packages"))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-compile"]
    subprocess.run([*pip, "--target", str(site), str(wheel)], check=True, capture_output=True)
    (site / "zz_others.pth").write_text(sysconfig.get_paths()["purelib"] + "\n", encoding="utf-8")
    code = "import sys, optin_export.cli.app as cli; sys.exit(cli.main())"

    def installed(*words: str) -> str:
        line = [str(place / "bin" / "python"), "-P", "-c", code, *words]
        return subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, check=True, env={"PATH": ""}).stdout

    where = [str(place / "bin" / "python"), "-P", "-c", "import optin_export; print(optin_export.__file__)"]
    found = subprocess.run(where, cwd=tmp_path, capture_output=True, text=True, check=True, env={"PATH": ""}).stdout
    assert Path(found.strip()).is_relative_to(place)
    assert optin_export.__version__ in installed("--version")
    assert '"recipe"' in installed("schema")
    assert "optin_export.cli:main" in next(site.glob("optin_export-*.dist-info/entry_points.txt")).read_text()
