"""Model folders of a Triton repository change whole: staged beside it, renamed into it, the old ones kept.

Every folder of a repository is a model to Triton, a hidden one as well, so nothing is staged or kept inside: this is
done in `.NAME.optin-export/` beside the repository NAME, on the same file system.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from optin_export.errors import EnvironmentLacks, InputError
from optin_export.ship.config import check_name
from optin_export.ship.manifest import NAME as MANIFEST
from optin_export.ship.manifest import content_of, run_of

#: Writes the files of one model into the folder it is given.
Writer = Callable[[Path], None]


def office(repository: Path) -> Path:
    """Where staging and the models of before are: beside the repository, never inside."""
    whole = repository.resolve()
    return whole.parent / f".{whole.name}.optin-export"


def install(repository: Path, models: Mapping[str, Writer], run: str, replace: bool = False) -> list[str]:
    """Write every model of a shipment and put all in place, or none; returns the names that changed.

    run: identity of what ships. A model of another run, or of unknown origin, is refused unless `replace`; what is
    replaced is kept for `roll_back`. A model that would not change is left alone.
    Raises InputError for that and for names Triton refuses, EnvironmentLacks where the disk does not take it.
    """
    for name in models:
        check_name(name)
    with _locked(repository):
        if not replace:
            for name in models:
                _refuse_foreign(repository / name, run)
        try:
            staging = Path(tempfile.mkdtemp(dir=office(repository), prefix="staging-"))
        except OSError as error:
            raise _unwritable(repository, error) from error
        try:
            for name, write in models.items():
                (staging / name).mkdir()
                write(staging / name)
            _publish(staging)
            changed = [name for name in models if content_of(staging / name) != content_of(repository / name)]
            _swap(repository, {name: staging / name for name in changed})
            for name in set(models) - set(changed) if changed else ():
                # What is kept is the state before this shipment, in which this model was as it is.
                shutil.rmtree(office(repository) / "previous" / name, ignore_errors=True)
        except OSError as error:
            raise _unwritable(repository, error) from error
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    return changed


def roll_back(repository: Path, name: str) -> list[str]:
    """Put back what the last shipment of `name` replaced, with its companions; doing it twice undoes it.

    Raises InputError where nothing was kept.
    """
    check_name(name)
    if not repository.is_dir():
        raise InputError(f"{repository} is no model repository", "there is no such folder", "give its path")
    with _locked(repository):
        kept = office(repository) / "previous"
        if not (kept / name).is_dir():
            known = sorted(path.name for path in kept.glob("*")) if kept.is_dir() else []
            raise InputError(
                f"there is no earlier '{name}' of {repository}",
                f"kept are: {', '.join(known) or 'none'}",
                "name one of them, or ship an older run",
            )
        run = run_of(kept / name)
        names = [path.name for path in sorted(kept.iterdir()) if run_of(path) == run] if run else [name]
        try:
            staging = Path(tempfile.mkdtemp(dir=office(repository), prefix="staging-"))
            for one in names:
                (kept / one).rename(staging / one)
            try:
                _swap(repository, {one: staging / one for one in names})
            except BaseException:
                for one in names:
                    if (staging / one).exists():
                        (staging / one).rename(kept / one)
                raise
            shutil.rmtree(staging, ignore_errors=True)
        except OSError as error:
            raise _unwritable(repository, error) from error
    return names


def _swap(repository: Path, staged: Mapping[str, Path]) -> None:
    """Rename every staged folder into the repository and what was there to `previous`; undone where one fails."""
    kept = office(repository) / "previous"
    kept.mkdir(exist_ok=True)
    done: list[tuple[Path, Path]] = []

    def move(source: Path, target: Path) -> None:
        source.rename(target)
        done.append((source, target))

    retired = Path(tempfile.mkdtemp(dir=office(repository), prefix="staging-"))
    try:
        for name, folder in staged.items():
            if (repository / name).exists():
                if (kept / name).exists():
                    move(kept / name, retired / name)
                move(repository / name, kept / name)
            move(folder, repository / name)
    except BaseException:
        for source, target in reversed(done):
            target.rename(source)
        raise
    finally:
        shutil.rmtree(retired, ignore_errors=True)
    _sync(repository)


def _refuse_foreign(folder: Path, run: str) -> None:
    if not folder.exists():
        return
    owner = run_of(folder)
    if owner != run:
        raise InputError(
            f"{folder.parent} holds another model '{folder.name}'",
            f"it comes from {owner or 'elsewhere: it has no manifest of ours'}",
            "choose another name with --name, or overwrite it with --replace",
        )


def _publish(staging: Path) -> None:
    """Readable for a server under another user, and on the disk before it is renamed."""
    for path in staging.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _locked(repository: Path) -> Iterator[None]:
    """One change of a repository at a time."""
    try:
        repository.mkdir(parents=True, exist_ok=True)
        office(repository).mkdir(exist_ok=True)
        if office(repository).stat().st_dev != repository.stat().st_dev:
            raise InputError(
                f"{repository} is a file system of its own",
                "models are staged beside it and renamed into it",
                f"use a folder in it, such as {repository / 'models'}",
            )
        lock = (office(repository) / "lock").open("w")
    except OSError as error:
        raise _unwritable(repository, error) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise EnvironmentLacks(
                f"{repository} is being changed", "another optin-export holds its lock", "wait until it has finished"
            ) from None
        yield


def _unwritable(repository: Path, error: OSError) -> EnvironmentLacks:
    return EnvironmentLacks(
        f"cannot write {repository}; it is as it was before",
        error.strerror or str(error),
        "free disk space, or check permissions",
    )


def remove(repository: Path) -> None:
    """Delete a run's own repository, with what was kept beside it."""
    shutil.rmtree(repository, ignore_errors=True)
    shutil.rmtree(office(repository), ignore_errors=True)


def models_of(repository: Path) -> list[Path]:
    """Model folders that were shipped by this package."""
    return sorted(path.parent for path in repository.glob(f"*/{MANIFEST}"))
