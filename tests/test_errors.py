"""Three short lines, whatever a library put into its message."""

from __future__ import annotations

import pickle

from optin_export.errors import LONGEST, InputError


def test_lines_are_lines_and_not_endless() -> None:
    error = InputError("two\n lines", "x" * 100_000, "do\tthis")
    assert (error.what, error.fix) == ("two lines", "do this")
    assert len(error.why) == LONGEST and error.why.endswith(" ...")
    assert str(error).splitlines()[1].startswith("  why: xxx") and str(error).count("\n") == 2
    assert InputError("what", "y" * LONGEST, "fix").why == "y" * LONGEST
    again = pickle.loads(pickle.dumps(error))
    assert (again.what, again.why, again.fix) == (error.what, error.why, error.fix)
