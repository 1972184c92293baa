"""docs/triton.md: its commands are ones that the program takes, its metrics and fields those of the code."""

from __future__ import annotations

import re
import shlex

import pytest

from optin_export import commands
from optin_export.recipe.schema import ShipSection
from optin_export.ship.guide import METRICS
from optin_export.ship.server import ENVIRONMENT, PIP_LINES
from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "triton.md").read_text(encoding="utf-8")
LINES = re.findall(r"^ *(optin-export .*)$", PAGE.replace("\\\n", " "), re.MULTILINE)


@pytest.mark.parametrize("line", LINES)
def test_every_command_can_be_parsed(line: str) -> None:
    words = shlex.split(line)
    assert commands.parse(words[1], words[2:]).work


def test_the_page_names_what_the_code_has() -> None:
    assert len(LINES) >= 8
    for name in (*METRICS, *ShipSection.model_fields, ENVIRONMENT):
        assert f"`{name}`" in PAGE or name == "triton" or f" {name}=" in PAGE, name
    for line in PIP_LINES:
        assert line in PAGE
