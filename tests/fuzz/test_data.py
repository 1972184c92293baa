"""Arrays and images by anybody: archives that grow, headers that lie, pickles, and images that are something else."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from optin_export.data.batches import ImageProcessor
from optin_export.data.readers import load_examples
from optin_export.errors import InputError
from optin_export.recipe import DataSource
from tests.fuzz.oracle import bomb, harmless
from tests.fuzz.strategies import NUMBERS, mangled

CONFIG = {
    "input_size": (3, 16, 16),
    "interpolation": "bilinear",
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "crop_pct": 1.0,
}


def read(path: Path, target: str, source: str = "npz", needs: tuple[str, ...] = ("image", "label")) -> None:
    with harmless(target, path.parents[0]):
        examples = load_examples(DataSource.model_validate({"source": f"{source}:{path}"}), needs, 0)
        ImageProcessor(CONFIG).encode(examples)


def arrays() -> bytes:
    out = io.BytesIO()
    np.savez(out, images=np.zeros((3, 16, 16, 3), np.uint8), labels=np.arange(3))
    return out.getvalue()


@given(data=st.data())
def test_archives(data: st.DataObject, tmp_path: Path) -> None:
    (tmp_path / "a.npz").write_bytes(data.draw(mangled(arrays())))
    read(tmp_path / "a.npz", "npz")


@given(data=st.data())
def test_headers(data: st.DataObject, tmp_path: Path) -> None:
    """A header is a Python literal that anybody may have written."""
    shape = tuple(data.draw(st.lists(st.sampled_from(NUMBERS), min_size=1, max_size=4)))
    kinds = ["|u1", "<f8", "|O", "<U10", "|V8", "<M8[s]", "x", "<f99", [("a", "|O")], [("a", "<i4", (10**9,))]]
    values = {"descr": data.draw(st.sampled_from(kinds)), "fortran_order": data.draw(st.booleans()), "shape": shape}
    text = data.draw(st.sampled_from([repr(values), repr(values) + "+1", "(" * 5000, "__import__('os')", "{}"]))
    version = data.draw(st.sampled_from([b"\x01\x00", b"\x02\x00", b"\x03\x00", b"\x09\x09"]))
    length = len(text).to_bytes(2 if version[0] == 1 else 4, "little")
    content = b"\x93NUMPY" + version + length + text.encode() + data.draw(st.binary(max_size=64))
    if data.draw(st.integers(0, 4)) == 0:
        content = bomb(tmp_path)
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("images.npy", content)
        archive.writestr("labels.npy", content)
    read(tmp_path / "a.npz", "npz")


def test_an_archive_that_grows(tmp_path: Path) -> None:
    """400 KB that would become 400 MB: refused by what the archive says, before it is unpacked."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (400, 1000, 1000)})
    with (
        zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("images.npy", "w", force_zip64=True) as file,
    ):
        file.write(header.getvalue())
        for _ in range(400):
            file.write(bytes(1_000_000))
    assert (tmp_path / "a.npz").stat().st_size < 1_000_000
    with pytest.raises(InputError, match="cannot read") as caught:
        load_examples(DataSource.model_validate({"source": f"npz:{tmp_path / 'a.npz'}"}), ("image",), 0)
    assert "bomb" in caught.value.why


def picture(kind: str) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (20, 20), (1, 2, 3)).save(out, kind)
    return out.getvalue()


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(%pipe%touch canary) (w) file\n%%EOF\n"


@given(data=st.data())
def test_images(data: st.DataObject, tmp_path: Path) -> None:
    content = data.draw(
        st.one_of(
            st.sampled_from(["PNG", "JPEG", "BMP", "WEBP"]).flatmap(lambda kind: mangled(picture(kind), head=80)),
            st.sampled_from([EPS, picture("GIF"), picture("TIFF"), picture("PCX"), bomb(tmp_path), b""]),
        )
    )
    folder = tmp_path / "images"
    folder.mkdir(exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    (folder / data.draw(st.sampled_from(["a.png", "a.jpg", "a.bmp"]))).write_bytes(content)
    read(folder, "images", "images", ("image",))


def test_other_formats_are_not_read_whatever_their_suffix(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(EPS)
    with pytest.raises(InputError, match="cannot read the image"):
        ImageProcessor(CONFIG).encode(
            load_examples(DataSource.model_validate({"source": f"images:{tmp_path}"}), ("image",), 0)
        )


def test_an_image_of_a_billion_pixels(tmp_path: Path) -> None:
    content = bytearray(picture("PNG"))
    content[16:24] = (60_000).to_bytes(4, "big") * 2
    import zlib

    content[29:33] = zlib.crc32(bytes(content[12:29])).to_bytes(4, "big")
    (tmp_path / "a.png").write_bytes(bytes(content))
    read(tmp_path, "images", "images", ("image",))
