"""Inputs gone wrong: bytes that are flipped, cut and moved, and structures with values that nobody expects."""

from __future__ import annotations

import copy
import struct
from typing import Any

from hypothesis import strategies as st

#: Numbers at which things break, as little-endian bytes and as values.
NUMBERS = (0, 1, -1, 2**31 - 1, -(2**31), 2**32, 2**53, 2**63 - 1, -(2**63), 2**64, 10**18, 10**30, 10**400)
STRINGS = (
    "",
    "\0",
    "a\0b",
    "/etc/passwd",
    "../../../../etc/passwd",
    "file:///etc/passwd",
    "x" * 5000,
    "\ud800".encode("utf-8", "surrogatepass").decode("latin-1"),
    "𝒳" * 300,
    "os.system",
    "__class__",
    "torch.os.system",
    "hf-hub:evil/model",
    "local-dir:/tmp",
    "evil/kernels",
    "${HOME}",
    "%s%n",
    "nan",
    "1e999",
)


def deep(levels: int, of: Any = 0) -> Any:
    value = of
    for _ in range(levels):
        value = [value]
    return value


hostile = st.one_of(
    st.sampled_from(NUMBERS),
    st.sampled_from(STRINGS),
    st.sampled_from([None, True, False, [], {}, 1.5, -0.0, 1e308, [None], {"": None}, [[]], ["a"] * 500]),
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=20),
    st.builds(deep, st.integers(1, 60)),
    st.lists(st.integers(-5, 10**12), max_size=6),
    st.dictionaries(st.text(max_size=6), st.integers(-5, 5), max_size=4),
)


@st.composite
def mangled(draw: st.DrawFn, data: bytes, head: int | None = None, changes: int = 4) -> bytes:
    """`data` with a few changes; `head`: most of them in so many first bytes."""
    out = bytearray(data)
    for _ in range(draw(st.integers(1, changes))):
        reach = len(out) if head is None or draw(st.integers(0, 3)) == 0 else min(head, len(out))
        at = draw(st.integers(0, max(0, reach - 1)))
        kind = draw(st.sampled_from(["flip", "cut", "byte", "number", "drop", "insert", "repeat", "zero"]))
        if kind == "flip" and out:
            out[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "cut":
            del out[at:]
        elif kind == "byte" and out:
            out[at] = draw(st.sampled_from([0, 1, 0x7F, 0x80, 0xFF]))
        elif kind == "number":
            number = draw(st.sampled_from([n for n in NUMBERS if -(2**63) <= n < 2**63]))
            out[at : at + 8] = struct.pack("<q", number)
        elif kind == "drop":
            del out[at : at + draw(st.integers(1, 64))]
        elif kind == "insert":
            out[at:at] = draw(st.binary(min_size=1, max_size=16))
        elif kind == "repeat":
            out[at:at] = out[at : at + 64] * draw(st.integers(1, 8))
        elif kind == "zero":
            end = min(at + 32, len(out))
            out[at:end] = bytes(end - at)
    return bytes(out)


@st.composite
def twisted(draw: st.DrawFn, value: Any, changes: int = 3, values: st.SearchStrategy[Any] = hostile) -> Any:
    """A JSON-like structure with a few of its places replaced, removed, added or moved."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, changes))):
        places = list(_places(value))
        if not places:
            return copy.deepcopy(draw(values))  # some are lists that every draw shares
        node, key = draw(st.sampled_from(places))
        kind = draw(st.sampled_from(["replace", "replace", "replace", "remove", "add", "swap", "wrap"]))
        if kind == "replace":
            node[key] = copy.deepcopy(draw(values))
        elif kind == "remove":
            del node[key]
        elif kind == "wrap":
            node[key] = draw(st.sampled_from([[node[key]], {"a": node[key]}, str(node[key])]))
        elif kind == "add" and isinstance(node, dict):
            node[draw(st.text(max_size=12))] = copy.deepcopy(draw(values))
        elif kind == "swap":
            other, where = draw(st.sampled_from(places))
            if (isinstance(other, dict) and where in other) or (isinstance(other, list) and where < len(other)):
                node[key] = copy.deepcopy(other[where])
    return value


def _places(value: Any, depth: int = 0) -> Any:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in list(items):
        yield value, key
        if depth < 12:
            yield from _places(item, depth + 1)
