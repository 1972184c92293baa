"""`optin-export clean`: what a run can be without, or the whole run; only ever within run folders."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from optin_export.workdir.cleanup import RemovableFile

EPILOG = (
    "says what goes and how much that frees; --dry-run says it and deletes nothing. A later run of the recipe makes "
    "again what is missing. Folders that are no runs, files that a run did not write, and whatever lies behind a link "
    "are left alone"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from optin_export.workdir.cleanup import PARTS

    parser.add_argument("runs", metavar="RUN", type=Path, nargs="*", help="run folders")
    parser.add_argument("--all", metavar="DIR", type=Path, action="append", default=[], help="every run folder in DIR")
    parser.add_argument(
        "--keep", metavar="PART,...", default="report", help=f"parts that stay: {', '.join(PARTS)} (default: report)"
    )
    parser.add_argument("--everything", action="store_true", help="keep nothing: the whole run goes")
    parser.add_argument("--limit", metavar="SIZE", help="only the oldest runs, until all take at most this, e.g. 20GB")
    parser.add_argument(
        "--cache", action="store_true", help="TensorRT's timing caches in ~/.cache/optin-export as well"
    )
    parser.add_argument("--dry-run", action="store_true", help="delete nothing")


def run(options: argparse.Namespace) -> int:
    from optin_export.errors import InputError
    from optin_export.workdir import cleanup
    from optin_export.workdir.lock import held

    keep = [] if options.everything else [part for part in options.keep.split(",") if part]
    unknown = next((part for part in keep if part not in cleanup.PARTS), None)
    if unknown is not None:
        raise InputError(f"unknown part '{unknown}'", f"parts are {', '.join(cleanup.PARTS)}", "correct --keep")
    runs = [run for named in options.runs for run in cleanup.with_sweep(named)]
    runs += [run for folder in options.all for run in cleanup.runs_below(folder)]
    runs = list({run.resolve() if not run.is_symlink() else run: run for run in runs}.values())
    if not runs and not options.cache and not options.all:
        raise InputError("nothing to clean is named", "no run is given", "give run folders, or --all DIR")
    removable = [cleanup.find(run, keep) for run in runs]
    if options.limit is not None:
        used = [cleanup.size(run) for run in runs]
        ages = [(run / "recipe.yaml").stat().st_mtime for run in runs]
        chosen = cleanup.over_limit(removable, parse_size(options.limit), used, ages)
        runs, removable = [runs[index] for index in chosen], [removable[index] for index in chosen]
    caches = [path for path in _caches() if path.is_file() and not path.is_symlink()] if options.cache else []
    freed = sum(one.bytes for some in removable for one in some) + sum(path.stat().st_size for path in caches)
    if not options.dry_run:
        for folder in runs:
            with held(folder, "optin-export clean"):
                cleanup.delete(cleanup.find(folder, keep))
                if not keep:
                    cleanup.remove_if_empty(folder)
        for path in caches:
            path.unlink(missing_ok=True)
    if options.json:
        files = {str(run): [one.path for one in some] for run, some in zip(runs, removable, strict=True)}
        told = {"dry_run": options.dry_run, "freed_bytes": freed, "runs": files, "caches": [str(c) for c in caches]}
        print(json.dumps(told))
    else:
        for folder, some in zip(runs, removable, strict=True):
            print("\n".join(_told(folder, some)))
        print("\n".join([*map(str, caches), f"{'would free' if options.dry_run else 'freed'} {_readable(freed)}"]))
    return 0


def _told(run: Path, removable: list[RemovableFile]) -> list[str]:
    """One line per run, and one per place in it."""
    places: dict[str, list[int]] = {}
    for one in removable:
        places.setdefault(one.path.split("/")[0], []).append(one.bytes)
    lines = [f"{run}: {_readable(sum(one.bytes for one in removable))}"]
    return lines + [f"  {place}: {len(some)} file(s), {_readable(sum(some))}" for place, some in sorted(places.items())]


def _caches() -> list[Path]:
    return sorted((Path.home() / ".cache" / "optin-export").glob("tensorrt-*.cache"))


def parse_size(text: str) -> int:
    """'20GB' or '512 MiB' in bytes. Raises InputError."""
    from optin_export.errors import InputError

    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,3})?)\s*([KMGT]?)(i?)B?", text.strip(), re.IGNORECASE)
    if match is None:
        raise InputError(f"cannot read the size '{text[:60]}'", "it is no number with a unit", "write 20GB or 512MB")
    number, unit, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** " KMGT".index(unit.upper() or " "))


def _readable(size: int) -> str:
    value = float(size)
    for unit in ("bytes", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            break
        value /= 1000
    return f"{value:.0f} {unit}" if unit == "bytes" else f"{value:.1f} {unit}"
