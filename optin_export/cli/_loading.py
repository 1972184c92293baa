"""Say that torch is being loaded: it takes seconds, in which a terminal would show nothing."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

TEXT = "loading torch ..."


class _Notice(MetaPathFinder):
    """Finds no module; prints the text when torch is first looked for."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname == "torch":
            sys.meta_path.remove(self)
            print(TEXT, file=sys.stderr, flush=True)
        return None


@contextmanager
def loading_is_told(given: Sequence[str]) -> Iterator[None]:
    """In this block, a line on standard error says that torch is being loaded; only on a terminal, and not for
    --json and --quiet."""
    notice = _Notice()
    silent = {"--json", "--quiet", "-q"} & set(given) or "torch" in sys.modules or not sys.stderr.isatty()
    if not silent:
        sys.meta_path.insert(0, notice)
    try:
        yield
    finally:
        if notice in sys.meta_path:
            sys.meta_path.remove(notice)
