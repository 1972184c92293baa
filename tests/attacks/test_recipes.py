"""Recipes by anybody: each field with values that it cannot have, hostile YAML, and names that lead elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from optin_export.recipe.load import put
from optin_export.recipe.manual import describe_fields
from tests.attacks.attempt import attempt
from tests.attacks.conftest import Count, Folder
from tests.attacks.inputs import recipes
from tests.attacks.matrix import ALL, some

#: As they are written in YAML; no field takes them.
VALUES = {
    "a number of 400 digits": "9" * 400,
    "no number": ".nan",
    "infinite": "-.inf",
    "2^64": str(2**64),
    "below zero": "-1",
    "a date": "2001-01-01",
    "60 levels": "[" * 60 + "]" * 60,
    "a mapping": "{a: {b: [1, {c: d}]}}",
    "a list of lists": "[[[1]], [], [null]]",
    "an object": "!!python/object/apply:os.system ['touch canary']",
    "base 60": "1:30",
    "30000 entries": "[" + "1," * 30_000 + "]",
}
#: Fields that take any mapping, list, number or text.
FREE = ("sweep", "model.args", "gates", "model.prompt", "model.tokenizer")
FIELDS = sorted({path.replace("[]", ".0") for path in describe_fields() if not path.startswith(FREE)})
MARK = "the-value"
#: Each field has a few of the values.
FIELD_CASES = [
    (field, list(VALUES)[(number + step * 5) % len(VALUES)]) for number, field in enumerate(FIELDS) for step in range(2)
]
LAUGHS = "a0: &a0 [x,x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))
#: What comes before or after a good recipe, or in its place.
TEXTS = {
    "an alias bomb": LAUGHS,
    "an alias bomb of mappings": LAUGHS.replace("[x,x]", "{a: b}"),
    "a list in itself": "a: &a [*a]",
    "a mapping merged into itself": "a: &a {<<: *a}",
    "100000 levels": "[" * 100_000,
    "50000 mappings": "{a: " * 50_000,
    "60000 lists": "- " * 60_000,
    "60000 keys": "? " * 60_000,
    "a long number": "seed: 0x" + "f" * 100_000,
    "long base 60": "x: " + "1:" * 50_000 + "1",
    "base 8": "seed: 0777",
    "a key twice": "recipe: 1\nrecipe: 1",
    "two documents": "a: 1\n---\nb: 2",
    "another version": "%YAML 9.9\n---\na: 1",
    "a bad date": "a: 2001-99-99T99:99:99",
    "code": "? !!python/object/apply:os.system ['touch canary']\n: 1",
    "a module": "x: !!python/module:os",
    "markup in a key": '"[red]\\e[2J": 1',
    "a long key": "? " + "k" * 100_000 + "\n: 1",
    "no key": "{: 1, null: 2}",
    "UTF-16": "\ufeffrecipe: 1\n\0",
    "a tab": "a:\n\t- 1",
}
#: Names of runs, models and machines.
NAMES = {
    "a way out": "../../../../tmp/out",
    "a place": "/tmp/out",
    "nothing": "",
    "a dot": ".",
    "two dots": "..",
    "hidden": ".x",
    "an option": "-rf",
    "a slash": "a/b",
    "a NUL": "a\0b",
    "lines": "a\nerror: b",
    "markup": "[red]x[/red]",
    "a terminal": "\x1b]0;x\x07\x1b[2J",
    "right to left": "a\u202egpj",
    "half a character": "a\udcff",
    "long": "x" * 300,
    "a wild card": "*",
}


@pytest.fixture
def given(made: Folder, tmp_path: Path) -> Path:
    for name in ("images.npz", "vit.safetensors"):
        (tmp_path / name).symlink_to(made("inputs") / name)
    return tmp_path / "hostile.yaml"


@pytest.mark.parametrize(("field", "value"), FIELD_CASES if ALL else FIELD_CASES[::50])
def test_a_field(field: str, value: str, given: Path, count: Count) -> None:
    raw = recipes()["npz"]
    if ".0" in field:
        put(raw, field.partition(".0")[0], [{}])
    put(raw, field, MARK)
    given.write_text(yaml.safe_dump(raw).replace(MARK, VALUES[value]))
    count("fields of recipes")
    found = attempt([given, "--dry-run"])
    assert found.is_clean and found.code == 2, found.told


@pytest.mark.parametrize("name", some(list(TEXTS), 11))
@pytest.mark.parametrize("where", some(["alone", "behind"], 2))
def test_yaml(name: str, where: str, given: Path, count: Count) -> None:
    good = yaml.safe_dump(recipes()["npz"])
    text = TEXTS[name] if where == "alone" else good + TEXTS[name] + "\n"
    given.write_text(text, encoding="utf-8")
    count("YAML")
    found = attempt([given, "--dry-run"])
    assert found.is_clean and found.code == 2, found.told


#: A name goes in at the end.
PLACES = {
    "recipe": ["hostile.yaml", "--dry-run", "--set", "name="],
    "ship": ["ship", "RUN", "--to", "models", "--name="],
    "measure": ["measure", "RUN", "--quiet", "--machine="],
    "rollback": ["rollback", "MODELS", "--", ""],
    "client": ["client", "127.0.0.1:9", "--model", "a", "--model="],
    "verify": ["verify", "--", ""],
}


@pytest.mark.parametrize("name", some(list(NAMES), 16))
@pytest.mark.parametrize("place", some(list(PLACES), 2))
def test_names(name: str, place: str, given: Path, copied: Folder, made: Folder, count: Count) -> None:
    given.write_text(yaml.safe_dump(recipes()["npz"]))
    words = list(PLACES[place])
    if "RUN" in words:
        words[words.index("RUN")] = str(copied("run"))
    if "MODELS" in words:
        words[words.index("MODELS")] = str(copied("models") / "models")
    count("names")
    found = attempt([*words[:-1], words[-1] + NAMES[name]], seconds=60)
    assert found.is_clean, found.told
