"""The pages in a real Chromium: offline, light and dark, on a phone, by keyboard, to a screen reader, on paper."""

from __future__ import annotations

import base64
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.browser.conftest import HOSTILE

PAGES = ("report", "hostile", "compare")
PHONE = {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True}
DESK = {"width": 1100, "height": 800, "deviceScaleFactor": 1, "mobile": False}
#: What can be reached with the Tab key, and is on the screen.
REACHABLE = "[...document.querySelectorAll('a[href], summary, [tabindex=\"0\"]')].filter(e => e.checkVisibility())"
#: Contrast of text to the background behind it by WCAG 2, for every element that holds text itself.
CONTRAST = """
const lum = c => {
  const [r, g, b] = c.map(v => { v /= 255; return v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4 });
  return .2126 * r + .7152 * g + .0722 * b };
const rgb = s => s.match(/[\\d.]+/g).map(Number);
const behind = e => { for (; e; e = e.parentElement) { const c = rgb(getComputedStyle(e).backgroundColor);
  if (c.length < 4 || c[3] > 0) return c.slice(0, 3) } return [255, 255, 255] };
return [...document.querySelectorAll('body *')].filter(e => !e.closest('svg') && e.checkVisibility()
  && [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim())).map(e => {
  const [a, b] = [lum(rgb(getComputedStyle(e).color).slice(0, 3)), lum(behind(e))].sort((x, y) => y - x);
  return [(a + .05) / (b + .05), e.tagName + ': ' + e.textContent.trim().slice(0, 40)] }).filter(p => p[0] < 4.5);
"""


def show(chromium: Any, page: Path, metrics: dict[str, Any], scheme: str = "light") -> None:
    chromium.get("about:blank")
    chromium.get_log("browser"), chromium.get_log("performance")  # those of the page before
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    chromium.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    chromium.get(page.as_uri())


@pytest.mark.parametrize("name", PAGES)
def test_nothing_is_requested_and_the_console_is_empty(chromium: Any, pages: dict[str, Path], name: str) -> None:
    show(chromium, pages[name], DESK)
    assert chromium.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in chromium.get_log("performance")]
    asked = {event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"}
    own = pages[name].as_uri()
    assert own in asked, "the log sees requests"
    assert all(url == own or url.startswith("data:") for url in asked), asked


@pytest.mark.parametrize("name", PAGES)
def test_a_phone_scrolls_only_downwards(chromium: Any, pages: dict[str, Path], name: str) -> None:
    show(chromium, pages[name], PHONE)
    chromium.execute_script("document.querySelectorAll('details').forEach(e => e.open = true)")
    wide, out = chromium.execute_script(
        "return [document.documentElement.scrollWidth, [...document.querySelectorAll('body *')].filter(e => "
        "!e.closest('.scroll') && !e.closest('pre') && e.getBoundingClientRect().right > 361).map(e => e.outerHTML)]"
    )
    assert wide <= 360 and out == []
    boxes = chromium.execute_script("return document.querySelectorAll('.scroll').length")
    assert boxes, "wide tables scroll in boxes of their own"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", PAGES)
def test_light_and_dark_have_contrast(
    chromium: Any, pages: dict[str, Path], name: str, scheme: str, tmp_path: Path
) -> None:
    show(chromium, pages[name], DESK, scheme)
    chromium.execute_script("document.querySelectorAll('details').forEach(e => e.open = true)")
    paper, plot = chromium.execute_script(
        "const of = (e, what) => getComputedStyle(e)[what].match(/\\d+/g).slice(0, 3).reduce((a, b) => a + +b, 0);"
        "return [of(document.body, 'backgroundColor'), of(document.querySelector('svg.plot text'), 'fill')]"
    )
    assert (paper < 150) == (scheme == "dark") and (plot > 500) == (scheme == "dark"), (paper, plot)
    assert chromium.execute_script(CONTRAST) == []
    picture = tmp_path / f"{name}-{scheme}.png"
    assert chromium.save_screenshot(str(picture)) and picture.stat().st_size > 10_000


@pytest.mark.parametrize("name", PAGES)
def test_structure_for_screen_readers(chromium: Any, pages: dict[str, Path], name: str) -> None:
    show(chromium, pages[name], DESK)
    chromium.execute_script("document.querySelectorAll('details').forEach(e => e.open = true)")
    levels = chromium.execute_script("return [...document.querySelectorAll('h1,h2,h3,h4')].map(e => +e.tagName[1])")
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels)), levels
    marks = chromium.execute_script("return ['header','main','footer'].map(n => document.querySelectorAll(n).length)")
    assert marks == [1, 1, 1]
    tree = chromium.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    needed = {"region", "link", "image", "img", "table", "navigation", "DisclosureTriangle"}
    seen, names = set(), []
    for node in tree:
        role = node.get("role", {}).get("value")
        if role in needed and not node.get("ignored"):
            seen.add(role)
            names.append((role, node.get("name", {}).get("value", "")))
    assert {"region", "link", "table"} <= seen and seen & {"image", "img"}
    assert [role for role, said in names if not said.strip()] == []
    regions = [said for role, said in names if role == "region"]
    assert len(set(regions)) == len(regions), "regions are told apart by their names"
    anchors = chromium.execute_script(
        "return [...document.querySelectorAll('a[href^=\"#\"]')].filter(a => !document.getElementById(a.hash.slice(1)))"
        ".map(a => a.hash)"
    )
    assert anchors == []
    without = chromium.execute_script(
        "return [...document.querySelectorAll('table')].filter(t => !t.caption || [...t.querySelectorAll('th')]"
        ".some(h => !h.scope)).length"
    )
    assert without == 0


@pytest.mark.parametrize("name", PAGES)
def test_the_tab_key_reaches_everything_in_order(chromium: Any, pages: dict[str, Path], name: str) -> None:
    from selenium.webdriver.common.keys import Keys

    show(chromium, pages[name], DESK)
    count = chromium.execute_script(
        f"const all = {REACHABLE}; all.forEach((e, i) => e.dataset.at = i); return all.length"
    )
    assert count > 3
    for at in range(count):
        chromium.switch_to.active_element.send_keys(Keys.TAB)
        found, outline = chromium.execute_script(
            "const e = document.activeElement; return [e.dataset.at, getComputedStyle(e).outlineStyle]"
        )
        assert (found, outline) == (str(at), "solid"), "in the order of the page, and the focus is seen"
        if at == 0:
            top = chromium.execute_script("return document.activeElement.getBoundingClientRect().left")
            assert top >= 0 and "Skip" in chromium.switch_to.active_element.text


@pytest.mark.parametrize("name", PAGES)
def test_it_prints(chromium: Any, pages: dict[str, Path], name: str) -> None:
    show(chromium, pages[name], DESK, "dark")
    printed = base64.b64decode(chromium.execute_cdp_cmd("Page.printToPDF", {"printBackground": False})["data"])
    assert printed.startswith(b"%PDF-") and printed.count(b"/Type /Page\n") + printed.count(b"/Type /Page ") >= 1
    chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    look = (
        "const of = name => getComputedStyle(document.querySelector(name));"
        "return [of('body').color, of('.skip').display]"
    )
    assert chromium.execute_script(look) == ["rgb(0, 0, 0)", "none"]
    chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


def test_markup_in_names_stays_text(chromium: Any, pages: dict[str, Path]) -> None:
    for name in ("hostile", "compare"):
        show(chromium, pages[name], DESK)
        title, scripts, images, text = chromium.execute_script(
            "return [document.title, document.scripts.length, document.querySelectorAll('img').length, "
            "document.body.textContent]"
        )
        assert title != "pwned" and scripts == 0 and images == 0 and HOSTILE in text
