"""The code blocks of README.md and docs/, and what a reader needs around him to run them."""

from __future__ import annotations

import itertools
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import ROOT

PAGES = ["README.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))]
#: Why a block may be left unrun, in the comment above it: <!-- not run: needs ... -->.
REASON = re.compile(r"^needs (a GPU|a server|a cluster|Docker|the network|the extra \w+|CamVid|a checkpoint|a clone)")
#: What is no code: what a program printed, and formulas.
OUTPUT = "text"
_FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
_MARK = re.compile(r"<!-- ([a-z ]+)(?:: (.+?))? -->$", re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block. marks: the comment right above it, e.g. {"not run": "needs a GPU"}; line: where it begins."""

    page: str
    line: int
    language: str
    text: str
    marks: dict[str, str]

    @property
    def runs(self) -> bool:
        # What README.md marks as a command is what .ci/run executes (tests/test_docs.py).
        return self.language != OUTPUT and not {"not run", "command"} & set(self.marks)

    @property
    def title(self) -> str | None:
        """The file that the block is saved as: its first line, `# name.yaml`."""
        found = re.match(r"# ([\w-]+\.(?:yaml|py))\n", self.text)
        return found.group(1) if found else None

    @property
    def where(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(page: str) -> list[Block]:
    text = (ROOT / page).read_text(encoding="utf-8")
    found = []
    for fence in _FENCE.finditer(text):
        indent, language, body = fence.groups()
        above = text[: fence.start()].rstrip("\n").rsplit("\n", 1)[-1].strip()
        mark = _MARK.match(above)
        plain = "\n".join(line.removeprefix(indent) for line in body.splitlines()) + "\n"
        marks = {mark.group(1): mark.group(2) or ""} if mark else {}
        found.append(Block(page, text.count("\n", 0, fence.start()) + 1, language, plain, marks))
    return found


def unfenced(page: str) -> list[str]:
    """Lines that are code by their indentation alone: nobody would know what they are."""
    text = _FENCE.sub("", (ROOT / page).read_text(encoding="utf-8"))
    lines = text.split("\n")
    return [line for above, line in itertools.pairwise(lines) if not above and re.match(" {4,}\\S", line)]


def commands_of(text: str) -> list[list[str]]:
    """The command lines of a shell block as words, redirections too. ValueError for what needs a shell."""
    lines = []
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="><&|;")
        lexer.whitespace_split = True
        words = list(lexer)  # comments go
        lines += [[]] if words else []
        for word in words:
            if word in ("&&", ";"):
                lines.append([])
            elif set(word) <= set("<&|;"):
                raise ValueError(f"a shell is needed for {word}")
            else:
                lines[-1].append(word)
    return [line for line in lines if line]


def is_plain(block: Block) -> bool:
    """Whether a shell block is nothing but calls of optin-export."""
    try:
        return all(words[0] == "optin-export" for words in commands_of(block.text))
    except ValueError:
        return False


def arguments_of(words: list[str]) -> tuple[list[str], dict[str, Path]]:
    """The arguments of a call, and where its streams go: {"1": file, "2": file}."""
    arguments: list[str] = []
    streams: dict[str, Path] = {}
    left = iter(words[1:])
    for word in left:
        if word == ">":
            stream = arguments.pop() if arguments and arguments[-1] == "2" else "1"
            streams[stream] = Path(next(left))
        else:
            arguments.append(word)
    return arguments, streams
