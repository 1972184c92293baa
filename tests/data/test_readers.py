"""Data sources: what a row is for each kind, and one clear InputError for what cannot be read."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from optin_export.data.readers import Examples, load_examples, spare_examples
from optin_export.errors import EnvironmentLacks, InputError
from optin_export.recipe import DataSource

Write = Callable[[str, str | bytes], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def load(source: str, needs: tuple[str, ...] = ("text",), seed: int = 0, **fields: Any) -> Examples:
    return load_examples(DataSource.model_validate({"source": source, **fields}), needs, seed)


def refused(source: str, needs: tuple[str, ...] = ("text",), **fields: Any) -> InputError:
    with pytest.raises(InputError) as caught:
        load(source, needs, **fields)
    assert str(caught.value).count("\n") == 2 and caught.value.why
    return caught.value


# --- tables ---------------------------------------------------------------------------------------------------------


def test_quotes_in_a_tsv_are_text_and_in_a_csv_are_quotes(write: Write) -> None:
    tsv = write("a.tsv", '"Quoted" start\t0\nan " unbalanced quote\t1\n')
    assert load(f"tsv:{tsv}", columns={"text": 0}).columns["text"] == ['"Quoted" start', 'an " unbalanced quote']
    table = write("a.csv", '"one, two",0\n"say ""hi""",1\n"two\nlines",2\n')
    assert load(f"csv:{table}", columns={"text": 0}).columns["text"] == ["one, two", 'say "hi"', "two\nlines"]


def test_an_unbalanced_quote_in_a_csv_does_not_swallow_the_rest(write: Write) -> None:
    table = write("a.csv", 'first,0\n"second,1\nthird,2\n')
    assert "cannot parse" in refused(f"csv:{table}", columns={"text": 0}).what


@pytest.mark.parametrize(
    ("columns", "header", "expected"),
    [
        ({"text": 0}, False, ["text", "a", "b"]),
        ({"text": 0}, None, ["text", "a", "b"]),
        ({}, None, ["a", "b"]),
        ({"text": 0}, True, ["a", "b"]),
        ({"text": "text"}, None, ["a", "b"]),
        ({"text": "text", "label": 1}, None, ["a", "b"]),
    ],
)
def test_the_first_line_is_a_header_if_columns_are_named(
    write: Write, columns: dict[str, int | str], header: bool | None, expected: list[str]
) -> None:
    table = write("a.csv", "text,label\na,0\n\nb,1\n")
    assert load(f"csv:{table}", columns=columns, header=header).columns["text"] == expected


def test_a_byte_order_mark_is_no_part_of_the_first_name(write: Write) -> None:
    table = write("a.csv", b"\xef\xbb\xbftext,label\na,0\n")
    assert load(f"csv:{table}", columns={"text": "text"}).columns["text"] == ["a"]


@pytest.mark.parametrize(
    ("content", "columns", "says"),
    [
        ("text,label\na,0\n", {"text": "sentence"}, "has no column 'sentence'"),
        ("a,0\nb,1\n", {"text": 2, "label": 1}, "has no column 2; its first line has 2"),
        ("a,0\nb\nc,1\n", {"text": 0, "label": 1}, "line 2 has no column 1"),
        ("a,0\n,1\n", {"text": 0, "label": 1}, "'text' of line 2 is empty"),
        ("a,0\nb, \n", {"text": 0, "label": 1}, "'label' of line 2 is empty"),
        ("a,0\nb,NaN\n", {"text": 0, "label": 1}, "'label' of line 2 is empty, NaN"),
        ("a,0\n", {"label": 1}, "has no 'text'"),
        ("", {"text": 0, "label": 1}, "no usable rows"),
        ("", {"text": "text", "label": 1}, "no column 'text'"),
        ("text,label\n", {"text": "text", "label": "label"}, "no usable rows"),
        (b"\x00\x9f\x92\x96" * 50, {"text": 0, "label": 1}, "cannot parse"),
        (b"PK\x03\x04\xff\xd8\x00", {"text": 0, "label": 1}, "cannot parse"),
    ],
)
def test_a_bad_table(write: Write, content: str | bytes, columns: dict[str, int | str], says: str) -> None:
    error = refused(f"csv:{write('bad.csv', content)}", ("text", "label"), columns=columns)
    assert says in f"{error.what}; {error.why}"


def test_a_path_that_is_no_file(tmp_path: Path) -> None:
    for kind in ("csv", "tsv", "npz"):
        assert "No such file" in refused(f"{kind}:{tmp_path / 'none'}", columns={"text": 0}).why
        assert "directory" in refused(f"{kind}:{tmp_path}", columns={"text": 0}).why
    assert "none" in refused(f"images:{tmp_path / 'none'}", ("image",)).why


def test_a_source_without_a_known_prefix(tmp_path: Path) -> None:
    assert "unknown data source" in refused(str(tmp_path / "a.csv")).what


# --- drawing rows ---------------------------------------------------------------------------------------------------


def test_rows_are_drawn_under_the_seed_in_their_order_and_never_more_than_there_are(write: Write) -> None:
    table = write("a.csv", "".join(f"row {i},{i}\n" for i in range(50)))

    def draw(samples: int | None, seed: int) -> list[int]:
        examples = load(f"csv:{table}", ("text", "label"), seed, columns={"text": 0, "label": 1}, samples=samples)
        assert [f"row {label}" for label in examples.columns["label"]] == examples.columns["text"]
        return [int(label) for label in examples.columns["label"]]

    assert draw(10, 3) == draw(10, 3) != draw(10, 4)
    assert len(set(draw(10, 3))) == 10 and draw(10, 3) == sorted(draw(10, 3)) != list(range(10))
    assert draw(None, 0) == draw(50, 0) == draw(1000, 0) == list(range(50))

    def spare(samples: int | None, most: int) -> set[int]:
        section = DataSource(source=f"csv:{table}", columns={"label": 1}, samples=samples)
        return {int(label) for label in spare_examples(section, ("label",), 3, most).columns["label"]}

    assert spare(10, 100) == set(range(50)) - set(draw(10, 3))
    assert len(spare(10, 4)) == 4 and not spare(10, 4) & set(draw(10, 3))
    assert spare(None, 4) == spare(60, 4) == set()


# --- arrays ---------------------------------------------------------------------------------------------------------


def pixels(count: int = 4) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 8, 8), dtype=np.uint8)


def test_arrays_by_default_and_by_given_name(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=pixels(), labels=np.arange(4), x=pixels()[::-1], text=np.array(list("abcd")))
    source = f"npz:{tmp_path / 'a.npz'}"
    assert np.array_equal(load(source, ("image", "label")).columns["image"], pixels())
    assert np.array_equal(load(source, ("image",), columns={"image": "x"}).columns["image"], pixels()[::-1])
    assert load(source).columns["text"] == ["a", "b", "c", "d"]
    drawn = load(source, ("image", "label"), samples=2).columns
    assert len(drawn["image"]) == 2 and np.array_equal(drawn["image"], pixels()[np.asarray(drawn["label"])])


class Bomb:
    """Unpickling it makes a file: the mark of code that ran."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


def test_pickled_arrays_are_refused_and_run_nothing(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    np.savez(tmp_path / "a.npz", images=np.array([Bomb(mark)], dtype=object), allow_pickle=True)
    (tmp_path / "b.npz").write_bytes(pickle.dumps(Bomb(mark)))
    assert "allow_pickle=False" in refused(f"npz:{tmp_path / 'a.npz'}", ("image",)).why
    refused(f"npz:{tmp_path / 'b.npz'}", ("image",))
    assert not mark.exists()


def test_a_damaged_or_foreign_file_of_arrays(tmp_path: Path, write: Write) -> None:
    np.savez(tmp_path / "good.npz", images=pixels(100))
    whole = (tmp_path / "good.npz").read_bytes()
    np.save(tmp_path / "single.npy", pixels())
    flipped = bytearray(whole)
    flipped[300:310] = bytes(10)
    damaged = {"half": whole[: len(whole) // 2], "empty": b"", "words": b"no archive", "flipped": bytes(flipped)}
    damaged["single"] = (tmp_path / "single.npy").read_bytes()
    for name, content in damaged.items():
        assert "cannot read" in refused(f"npz:{write(name + '.npz', content)}", ("image",)).what, name


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"pictures": np.zeros((2, 8, 8))}, "has no array 'images'; it holds pictures"),
        ({"images": np.full((2, 1, 8, 8), np.nan), "labels": np.arange(2)}, "'image' of row 0 is empty, NaN"),
        ({"images": np.zeros((2, 8, 8)), "labels": np.array([0, np.nan])}, "'label' of row 1 is empty, NaN"),
        ({"images": np.zeros((2, 8, 8)), "labels": np.array([0, np.inf])}, "'label' of row 1"),
        ({"images": np.zeros((2, 8, 8)), "labels": np.arange(3)}, "rows per column: {'image': 2, 'label': 3}"),
        ({"images": np.zeros((0, 8, 8)), "labels": np.arange(0)}, "no usable rows"),
        ({"images": np.float64(1), "labels": np.arange(1)}, "not one value per row"),
    ],
)
def test_unusable_arrays(tmp_path: Path, arrays: dict[str, Any], says: str) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    error = refused(f"npz:{tmp_path / 'a.npz'}", ("image", "label"))
    assert says in f"{error.what}; {error.why}"


# --- images ---------------------------------------------------------------------------------------------------------


def picture(path: Path, value: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (value, 0, 0)).save(path)


def test_class_folders_are_the_labels(tmp_path: Path) -> None:
    for name in ("zebra/1.png", "ant/1.png", "ant/2.PNG", "mouse/1.jpg"):
        picture(tmp_path / name)
    (tmp_path / "ant" / "notes.txt").write_text("no image", encoding="utf-8")
    examples = load(f"images:{tmp_path}", ("image", "label"))
    assert [path.parent.name for path in examples.columns["image"]] == ["ant", "ant", "mouse", "zebra"]
    assert examples.columns["label"] == ["ant", "ant", "mouse", "zebra"]
    assert examples.classes == ("ant", "mouse", "zebra")


def test_label_pattern(tmp_path: Path) -> None:
    for name in ("a-3.png", "b-1.png"):
        picture(tmp_path / name)
    assert load(f"images:{tmp_path}", ("image", "label"), label_pattern=r"-(\d)\.").columns["label"] == ["3", "1"]
    assert "does not match" in refused(f"images:{tmp_path}", ("image", "label"), label_pattern=r"_(\d)").why
    assert "not in a class folder" in refused(f"images:{tmp_path}", ("image", "label")).why
    assert len(load(f"images:{tmp_path}", ("image",))) == 2


def test_a_folder_without_images(tmp_path: Path) -> None:
    assert "no images" in refused(f"images:{tmp_path}", ("image",)).what


def test_the_digest_is_that_of_the_content(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", 1)
    first = load(f"images:{tmp_path}", ("image",)).digest()
    assert load(f"images:{tmp_path}", ("image",)).digest() == first
    picture(tmp_path / "a.png", 2)
    assert load(f"images:{tmp_path}", ("image",)).digest() != first
    assert (
        Examples({"image": [Image.new("L", (2, 2))]}).digest() == Examples({"image": [Image.new("L", (2, 2))]}).digest()
    )
    assert Examples({"text": ["a", "b"]}).digest() != Examples({"text": ["ab"]}).digest()


# --- the user's own function ----------------------------------------------------------------------------------------

FUNCTIONS = """
import sys
import numpy as np
import torch
def columns(): return {"text": ["a", "b"], "label": np.array([0, 1])}
def rows(): return ({"text": t, "label": i, "t2": t * 2} for i, t in enumerate("ab"))
def raises(): raise KeyError("oh no")
def leaves(): sys.exit(0)
def late():
    yield {"text": "a"}
    raise RuntimeError("half way")
def nothing(): return None
def number(): return 5
def numbers(): return [1, 2]
def words(): return ["text"]
def tuples(): return [("a", 0)]
def string(): return {"text": "abc"}
def tensor(): return {"text": torch.zeros(3)}
def typed(): return {"text": ["a", 5]}
def bytes_(): return {"text": [b"a"]}
def none(): return {"text": ["a", None]}
def lengths(): return {"text": ["a"], "label": [1, 2]}
def empty(): return []
def needs_argument(x): return x
value = 5
"""


@pytest.fixture
def functions(write: Write) -> str:
    return f"py:{write('rows.py', FUNCTIONS)}"


def test_rows_and_columns_of_a_function(functions: str) -> None:
    for name in ("columns", "rows"):
        examples = load(f"{functions}:{name}", ("text", "label"))
        assert list(examples.columns["text"]) == ["a", "b"] and list(examples.columns["label"]) == [0, 1]
    assert load(f"{functions}:rows", columns={"text": "t2"}).columns["text"] == ["aa", "bb"]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("raises", "oh no"),
        ("leaves", "SystemExit"),
        ("late", "half way"),
        ("nothing", "NoneType"),
        ("number", "int"),
        ("numbers", "int"),
        ("words", "str"),
        ("tuples", "found: nothing"),
        ("string", "is a str, not one value per row"),
        ("tensor", "is a Tensor, not one value per row"),
        ("typed", "'text' of row 1 is a int, not text"),
        ("bytes_", "'text' of row 0 is a bytes, not text"),
        ("none", "'text' of row 1 is empty"),
        ("empty", "rows per column"),
        ("needs_argument", "argument"),
        ("value", "not callable"),
        ("absent", "absent"),
    ],
)
def test_a_function_that_gives_no_rows(functions: str, name: str, says: str) -> None:
    assert says in refused(f"{functions}:{name}").why


def test_columns_of_different_length(functions: str) -> None:
    assert "rows per column" in refused(f"{functions}:lengths", ("text", "label")).why


def test_a_file_that_cannot_be_imported(write: Write, tmp_path: Path) -> None:
    assert "SyntaxError" in refused(f"py:{write('a.py', 'def f(:')}:f").why
    assert "nosuch_package" in refused(f"py:{write('b.py', 'import nosuch_package')}:f").why
    assert "SystemExit" in refused(f"py:{write('c.py', 'raise SystemExit(0)')}:f").why
    assert "FileNotFoundError" in refused(f"py:{tmp_path / 'd.py'}:f").why
    assert "nosuch_module" in refused("py:nosuch_module.rows:f").why


# --- dataset repositories -------------------------------------------------------------------------------------------


def test_a_dataset_without_the_package_names_the_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(EnvironmentLacks) as caught:
        load("hf-dataset:glue:sst2")
    assert caught.value.exit_code == 5 and "pip install 'optin-export[datasets]'" in caught.value.fix


def test_reading_data_imports_no_optional_package(write: Write) -> None:
    table = write("a.csv", "a,0\n")
    code = (
        "import sys; from optin_export.recipe import DataSource; from optin_export.data.readers import load_examples\n"
        f"load_examples(DataSource(source='csv:{table}', columns={{'text': 0}}), ('text',), 0)\n"
        "assert not {'datasets', 'onnxruntime', 'tritonclient'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
