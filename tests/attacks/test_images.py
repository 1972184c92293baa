"""Images by anybody, in a folder and as a class of it: by content, by size, by what is in the file."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from tests.attacks.attempt import attempt
from tests.attacks.conftest import Count, Folder
from tests.attacks.matrix import ALL


def saved(image: Image.Image, kind: str = "PNG") -> bytes:
    made = io.BytesIO()
    image.save(made, kind)
    return made.getvalue()


def png(width: int, height: int, data: bytes = b"", depth: int = 8, colour: int = 0) -> bytes:
    """A PNG that claims a size."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def bmp(width: int, height: int) -> bytes:
    return b"BM" + struct.pack("<IIIIiiHHIIiiII", 0, 0, 54, 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)


WHOLE = saved(Image.new("L", (16, 16)))
IMAGES: dict[str, Callable[[], bytes]] = {
    "a bomb of 60000 x 60000": lambda: png(60_000, 60_000, zlib.compress(bytes(1 << 20))),
    "2^31 pixels wide": lambda: png(2**31 - 1, 1),
    "2^31 pixels high": lambda: png(1, 2**31 - 1),
    "no pixels": lambda: png(0, 0),
    "no width": lambda: png(0, 16),
    "no data": lambda: png(16, 16),
    "wrong data": lambda: png(16, 16, b"x" * 100),
    "fewer pixels than it says": lambda: png(16, 16, zlib.compress(bytes(100))),
    "a depth of 3": lambda: png(16, 16, zlib.compress(bytes(272)), depth=3),
    "a colour of 9": lambda: png(16, 16, zlib.compress(bytes(272)), colour=9),
    "cut": lambda: WHOLE[: len(WHOLE) // 2],
    "a head alone": lambda: WHOLE[:33],
    "a sign alone": lambda: WHOLE[:8],
    "EPS": lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n(canary) (w) file\nshowpage\n",
    "PDF": lambda: b"%PDF-1.4\n1 0 obj<</OpenAction<</S/Launch/F(touch canary)>>>>endobj\n",
    "SVG": lambda: b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
    "GIF": lambda: saved(Image.new("L", (16, 16)), "GIF"),
    "TIFF": lambda: saved(Image.new("L", (16, 16)), "TIFF"),
    "PPM": lambda: b"P6 100000000 100000000 255\n",
    "float pixels": lambda: saved(Image.new("F", (16, 16)), "TIFF"),
    "a JPEG that is cut": lambda: saved(Image.new("L", (160, 160)), "JPEG")[:200],
    "a JPEG of no size": lambda: b"\xff\xd8\xff\xc0\x00\x0b\x08\x00\x00\x00\x00\x01\x01\x11\x00\xff\xd9",
    "a WEBP that is cut": lambda: saved(Image.new("RGB", (160, 160)), "WEBP")[:30],
    "a BMP of 2^31": lambda: (
        b"BM" + struct.pack("<IIIIiiHHIIiiII", 0, 0, 54, 40, 2**31 - 1, 1, 1, 24, 0, 0, 0, 0, 0, 0)
    ),
    "a BMP below zero": lambda: bmp(-5, -5),
    "HTML": lambda: b"<html><script>1</script></html>",
    "a program": lambda: b"\x7fELF" + bytes(100),
    "a pickle": lambda: b"\x80\x04cos\nsystem\n(S'touch canary'\ntR.",
    "a zip": lambda: b"PK\x03\x04" + bytes(100),
}
#: In which recipe, and how far a run goes.
COMMANDS = [
    ("images", ["--dry-run"]),
    ("images", ["--out", "new", "--stop-after", "sources", "--quiet"]),
    ("clip", ["--out", "new", "--stop-after", "sources", "--quiet"]),
]
CASES = [(name, at) for name in IMAGES for at in range(len(COMMANDS))]


@pytest.mark.parametrize(("name", "command"), CASES if ALL else CASES[::40])
def test_refused(name: str, command: int, copied: Folder, count: Count) -> None:
    folder = copied("inputs")
    (folder / "images" / "0" / "0.png").write_bytes(IMAGES[name]())
    recipe, words = COMMANDS[command]
    count("images")
    found = attempt([folder / f"{recipe}.yaml", *words])
    assert found.is_clean and found.code == 2, found.told
    assert "0.png" in found.error


@pytest.mark.parametrize("size", [(60_000, 1), (1, 60_000)] if ALL else [(60_000, 1)])
def test_a_shape_that_no_image_has(size: tuple[int, int], copied: Folder, count: Count) -> None:
    """Stretched it is an image like others; where its shape is kept it would become gigabytes."""
    folder = copied("inputs")
    (folder / "images" / "0" / "0.png").write_bytes(saved(Image.new("L", size)))
    count("images")
    found = attempt([folder / "clip.yaml", "--out", "new", "--stop-after", "sources", "--quiet"])
    assert found.is_clean and found.code == 2, found.told
    assert not Path("canary").exists()
