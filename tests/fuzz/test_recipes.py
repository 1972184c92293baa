"""Recipes by anybody: YAML text and structures. Validating one runs nothing, and takes bounded time and memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from optin_export.data.readers import load_examples
from optin_export.recipe import load_recipe
from tests.fuzz.oracle import canary, harmless
from tests.fuzz.strategies import hostile, mangled, twisted
from tests.robust import forked


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return forked.write_recipe(tmp_path_factory.mktemp("recipe")).read_text()


def load(root: Path, content: str | bytes, overrides: tuple[str, ...] = ()) -> None:
    path = root / "hostile.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    with harmless("recipe", root):
        recipe = load_recipe(path, overrides)
        path.write_text(recipe.to_yaml(), encoding="utf-8")
        assert load_recipe(path) == recipe  # what the run folder holds can be read again


@given(data=st.data())
def test_text(data: st.DataObject, text: str, tmp_path: Path) -> None:
    load(tmp_path, data.draw(mangled(text.encode())))


@given(data=st.data())
def test_structures(data: st.DataObject, text: str, tmp_path: Path) -> None:
    load(tmp_path, yaml.safe_dump(data.draw(twisted(yaml.safe_load(text), changes=2))))


@given(data=st.data())
def test_overrides(data: st.DataObject, text: str, tmp_path: Path) -> None:
    keys = [
        "seed",
        "prune.budget",
        "targets.0.threads",
        "export.batch.1",
        "model.args.a.b",
        "name",
        "a..b",
        "",
        "prune.0",
    ]
    key = data.draw(st.sampled_from(keys) | st.text(max_size=20))
    load(tmp_path, text, (f"{key}={data.draw(hostile)}",))


TAGS = (
    "!!python/object/apply:os.system",
    "!!python/object/new:os.system",
    "!!python/name:os.system",
    "!!python/module:os",
)
LAUGHS = "a0: &a0 [x,x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))


@given(
    tag=st.sampled_from(TAGS),
    place=st.sampled_from(["name: {}", "model: {}", "seed: {}", "? {}\n: 1", "{}", "<<: {}"]),
    form=st.sampled_from(["{} ['touch {}']", "{} 'touch {}'", "{} {{a: 'touch {}'}}"]),
)
def test_tags_that_make_objects(tag: str, place: str, form: str, text: str, tmp_path: Path) -> None:
    load(tmp_path, text + place.format(form.format(tag, canary(tmp_path))) + "\n")


@pytest.mark.parametrize(
    "content",
    [
        LAUGHS,
        LAUGHS.replace("[x,x]", "{a: b}"),
        "a: &a [*a]",
        "a: &a {<<: *a}",
        "[" * 100_000,
        "{a: " * 50_000,
        "- " * 60_000,
        "? " * 60_000,
        "seed: 0x" + "f" * 100_000,
        "seed: " + "1:" * 50_000 + "1",
        "seed: " + "9" * 150_000,
        "name: !!binary " + "A" * 100_000,
        "a: 2001-99-99T99:99:99",
        "%YAML 9.9\n---\na: 1",
        "a: 1\n---\nb: 2",
        "\ufeffrecipe: 1",
        "name: >\n" + " x\n" * 50_000,
        b"\xff\xfe" + "recipe: 1".encode("utf-16-le"),
        b"\0" * 1000,
        b"x" * 300_000,
    ],
    ids=range(20),
)
def test_bombs(content: str | bytes, text: str, tmp_path: Path) -> None:
    load(tmp_path, content)
    if isinstance(content, str):
        load(tmp_path, text + content)


@given(data=st.data())
def test_tables(data: st.DataObject, tmp_path: Path) -> None:
    from optin_export.recipe import DataSource

    kind = data.draw(st.sampled_from(["csv", "tsv"]))
    (tmp_path / "table").write_bytes(data.draw(mangled(b'text,label\n"a, b",1\nc,2\n' * 5) | st.binary(max_size=200)))
    columns = data.draw(st.sampled_from([{"text": 0, "label": 1}, {"text": "text", "label": "label"}, {"text": 10**6}]))
    with harmless("table", tmp_path):
        section = DataSource.model_validate({"source": f"{kind}:{tmp_path / 'table'}", "columns": columns})
        load_examples(section, tuple(columns), 0)
