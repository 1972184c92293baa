"""The column's name on every cell, with cells that span rows and columns."""

from __future__ import annotations

import re

from markupsafe import Markup

from optin_export.report.labels import labelled
from optin_export.report.names import meaning, plain, with_unit

ROWS = Markup(
    '<thead><tr><th scope="col">Target</th><th scope="col" class="n">Batch &amp; <b>size</b></th>'
    "<th>p50</th></tr></thead>"
    '<tbody><tr><th rowspan="2">a</th><td rowspan="2">1</td><td class="n">2 &lt; 3</td></tr><tr><td>3</td></tr></tbody>'
    '<tbody><tr><th>b</th><td colspan="2">none</td></tr></tbody>'
)


def test_cells_carry_the_name_of_their_column() -> None:
    found = labelled(ROWS)
    cells = re.findall(r"<t[dh][^>]*data-label=\"([^\"]*)\"[^>]*>([^<]*)", found)
    assert cells == [
        ("Target", "a"),
        ("Batch &amp; size", "1"),
        ("p50", "2 &lt; 3"),
        ("p50", "3"),
        ("Target", "b"),
    ]
    assert re.sub(r' data-label="[^"]*"', "", found) == ROWS  # nothing else has changed


def test_developer_keys_have_plain_names_and_units() -> None:
    assert plain("cut_agreement") == "kept units on which two halves agree" and meaning("lambda")
    assert plain("packages.torch") == "torch" and plain("some_key") == "some key" and meaning("some_key") == ""
    assert with_unit("bytes", 3241126, "3241126") == "3.1 MiB" and with_unit("bytes", 178303, "") == "174 KiB"
    assert with_unit("probes", 12.0, "12") == "12" and with_unit("system", "Linux", "Linux") == "Linux"
    assert with_unit("memory_gib", 23.5, "23.5") == "23.5 GiB"
