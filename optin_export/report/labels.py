"""Label every cell of a table with its column: on narrow screens cells stand below each other."""

from __future__ import annotations

from html import escape
from html.parser import HTMLParser

from markupsafe import Markup


def labelled(rows: Markup) -> Markup:
    """The rows of one table with `data-label` on the cells of its body; a cell may span rows."""
    parser = _Labels()
    parser.feed(str(rows))
    parser.close()
    return Markup("".join(parser.written))


class _Labels(HTMLParser):
    """Copies markup as it is, and adds attributes to the start tags of cells."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=False)
        self.written: list[str] = []
        self.columns: list[str] = []
        self.in_head = self.in_heading = False
        #: Column -> rows in which a cell from above still stands there.
        self.taken: dict[int, int] = {}
        self.at = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        text, given = self.get_starttag_text() or "", dict(attrs)
        if tag == "thead":
            self.in_head = True
        elif tag == "tbody" or tag == "tfoot":
            self.taken = {}
        elif tag == "tr":
            self.at = 0
        elif tag in ("td", "th") and self.in_head:
            self.columns.append("")
            self.in_heading = True
        elif tag in ("td", "th"):
            text = self._cell(text, given)
        self.written.append(text)

    def _cell(self, text: str, given: dict[str, str | None]) -> str:
        while self.taken.get(self.at, 0):
            self.taken[self.at] -= 1
            self.at += 1
        label = self.columns[self.at].strip() if self.at < len(self.columns) else ""
        wide, high = int(given.get("colspan") or 1), int(given.get("rowspan") or 1)
        for column in range(self.at, self.at + wide):
            self.taken[column] = high - 1
        self.at += wide
        return f'{text[:-1]} data-label="{escape(label)}">' if wide == 1 and label else text

    def handle_endtag(self, tag: str) -> None:
        if tag == "thead":
            self.in_head = False
        if tag in ("td", "th"):
            self.in_heading = False
        self.written.append(f"</{tag}>")

    def handle_data(self, data: str) -> None:
        if self.in_heading:
            self.columns[-1] += data
        self.written.append(data)

    def handle_entityref(self, name: str) -> None:
        self._reference(f"&{name};")

    def handle_charref(self, name: str) -> None:
        self._reference(f"&#{name};")

    def _reference(self, text: str) -> None:
        from html import unescape

        if self.in_heading:
            self.columns[-1] += unescape(text)
        self.written.append(text)
