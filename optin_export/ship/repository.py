"""Change a Triton repository atomically: new folders are staged next to it and renamed into it, old ones are kept.

Triton treats every folder of a repository as a model, also hidden ones, so nothing is staged or kept inside. This is
done in `.NAME.optin-export/` next to the repository NAME, on the same file system.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path

from optin_export.errors import EnvironmentLacks, InputError
from optin_export.ship import journal
from optin_export.ship.manifest import NAME as MANIFEST
from optin_export.ship.manifest import content_of, is_whole, run_of
from optin_export.ship.names import check_name
from optin_export.workdir.files import confined, make_folders, open_in, open_regular, opened_folder
from optin_export.workdir.files import remove as discard

#: Prefix of folders that hold the only copy of a model while it is moved.
_MOVING = "moving-"
#: Writes the files of one model into the given folder.
Writer = Callable[[Path], None]


def private_folder(repository: Path) -> Path:
    """The folder for staging and earlier models: next to the repository, never inside."""
    whole = repository.resolve()
    return whole.parent / f".{whole.name}.optin-export"


def install(repository: Path, models: Mapping[str, Writer], run: str, replace: bool = False) -> list[str]:
    """Write every model of a shipment and put all in place, or none; returns the names that changed.

    run: identity of the shipped run. A model of another run, or of unknown origin, is refused unless `replace`; a
    replaced model is kept for `roll_back`. A model that would not change is not written, unless its files no longer
    match its manifest: then it is replaced, and the damaged one is not kept.
    Raises InputError for a refused model and for names that Triton refuses, EnvironmentLacks if the disk cannot be
    written.
    """
    for name in models:
        check_name(name)
    with _locked(repository):
        if not replace:
            for name in models:
                _refuse_foreign(repository / name, run)
        try:
            staging = Path(tempfile.mkdtemp(dir=private_folder(repository), prefix="staging-"))
        except OSError as error:
            raise _unwritable(repository, error) from error
        try:
            for name, write in models.items():
                (staging / name).mkdir()
                write(staging / name)
            _publish(staging)
            same = [name for name in models if content_of(staging / name) == content_of(repository / name)]
            damaged = {name for name in same if not is_whole(repository / name)}
            changed = [name for name in models if name not in same or name in damaged]
            # The state before this shipment is kept, in which unchanged models were the same.
            unchanged = [name for name in models if name not in changed] if changed else []
            _swap(repository, {name: staging / name for name in changed}, damaged, unchanged)
        except OSError as error:
            raise _unwritable(repository, error) from error
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    return changed


def roll_back(repository: Path, name: str) -> list[str]:
    """Put back what the last shipment of `name` replaced, with its companions; doing it twice undoes it.

    If that shipment was killed while renaming, only its moved folders are put back.
    Raises InputError if nothing was kept.
    """
    check_name(name)
    if not repository.is_dir():
        raise InputError(f"{repository} is not a model repository", "there is no such folder", "give its path")
    if not os.path.lexists(private_folder(repository)):  # the lock would create it
        raise _nothing_kept(repository, name)
    with _locked(repository) as undone:
        if name in undone:
            return undone
        kept = private_folder(repository) / "previous"
        if not (kept / name).is_dir():
            raise _nothing_kept(repository, name)
        run = run_of(kept / name)
        names = [path.name for path in sorted(kept.iterdir()) if run_of(path) == run] if run else [name]
        try:
            # Not the prefix of temporary folders, because these are the only copies.
            exchange = Path(tempfile.mkdtemp(dir=private_folder(repository), prefix=_MOVING))
            try:
                _exchange(repository, names, exchange)
            finally:
                with contextlib.suppress(OSError):  # the next command puts back what it still holds
                    exchange.rmdir()
        except OSError as error:
            raise _unwritable(repository, error) from error
    return names


def _nothing_kept(repository: Path, name: str) -> InputError:
    known = sorted(path.name for path in (private_folder(repository) / "previous").glob("*"))
    return InputError(
        f"there is no earlier '{name}' of {repository}",
        f"available: {', '.join(known) or 'none'}",
        "choose one of them, or ship an older run",
    )


def _swap(
    repository: Path, staged: Mapping[str, Path], damaged: Collection[str] = (), unchanged: Collection[str] = ()
) -> None:
    """Rename every staged folder into the repository, and existing ones into `previous`; undone if one rename fails.

    damaged: models that are not kept, so that the previously kept ones stay. unchanged: models for which nothing is
    kept.
    """
    kept = private_folder(repository) / "previous"
    with opened_folder(kept):
        pass
    retired = Path(tempfile.mkdtemp(dir=private_folder(repository), prefix="staging-"))
    renames = []
    for name, folder in staged.items():
        if name in damaged:
            renames.append((repository / name, retired / name))
        elif os.path.lexists(repository / name):
            if os.path.lexists(kept / name):
                renames.append((kept / name, retired / name))
            renames.append((repository / name, kept / name))
        renames.append((folder, repository / name))
    renames += [(kept / name, retired / name) for name in unchanged if os.path.lexists(kept / name)]
    try:
        journal.carry_out(private_folder(repository) / journal.NAME, repository, renames)
    finally:
        shutil.rmtree(retired, ignore_errors=True)


def _exchange(repository: Path, names: Sequence[str], exchange: Path) -> None:
    """Swap models in the repository with those kept under the same names, through the folder `exchange`."""
    kept, renames = private_folder(repository) / "previous", []
    for name in names:
        renames.append((kept / name, exchange / name))
        if os.path.lexists(repository / name):
            renames.append((repository / name, kept / name))
        renames.append((exchange / name, repository / name))
    journal.carry_out(private_folder(repository) / journal.NAME, repository, renames)


def put_in_order(repository: Path) -> None:
    """Undo the renames of a change that was killed; does nothing without one."""
    if os.path.lexists(private_folder(repository) / journal.NAME):
        with _locked(repository):
            pass


def _refuse_foreign(folder: Path, run: str) -> None:
    if not folder.exists():
        return
    owner = run_of(folder)
    if owner != run:
        raise InputError(
            f"{folder.parent} already has another model '{folder.name}'",
            f"it comes from {owner or 'elsewhere: it has no manifest of optin-export'}",
            "choose another name with --name, or overwrite it with --replace",
        )


def _publish(staging: Path) -> None:
    """Make files readable for a server under another user, and flush them to the disk before the rename."""
    for path in staging.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
        if path.is_file():
            with open_regular(path) as file:
                os.fsync(file.fileno())


@contextlib.contextmanager
def _locked(repository: Path) -> Iterator[list[str]]:
    """Lock a repository for one change; first clean up after a killed one (yields the result of `_tidy`).

    Neither a run's own repository nor anything next to it may be a link: only our own files may be deleted and moved.
    """
    place = private_folder(repository)
    with contextlib.ExitStack() as stack:
        try:
            with opened_folder(repository):  # not through a link inside a run folder
                pass
            make_folders(place.parent)
            stack.enter_context(confined(place.parent))
            folder = stack.enter_context(opened_folder(place))
            if place.stat().st_dev != repository.stat().st_dev:
                raise InputError(
                    f"{repository} is a mount point",
                    "models are staged next to it and renamed into it",
                    f"use a folder in it, such as {repository / 'models'}",
                )
            lock = os.fdopen(open_in(folder, "lock", os.O_RDWR | os.O_CREAT))
            stack.enter_context(lock)
        except OSError as error:
            raise _unwritable(repository, error) from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise EnvironmentLacks(
                f"{repository} is being changed", "another optin-export holds its lock", "wait until it has finished"
            ) from None
        try:
            undone = _tidy(repository)
        except OSError as error:
            raise _unwritable(repository, error) from error
        yield undone


def _tidy(repository: Path) -> list[str]:
    """Clean up after a kill: undo the renames unless all were done, and delete staged files.

    Returns the models of a partly renamed shipment. Models that a rollback of an earlier version was moving without a
    journal are moved to a free name.
    """
    place = private_folder(repository)
    note = place / journal.NAME
    moves, undone = journal.read(note, repository), []
    if not journal.complete(moves):
        if any(move.made for move in moves) and not any(move.target.parent.name.startswith(_MOVING) for move in moves):
            undone = sorted({move.target.name for move in moves if move.target.parent == repository})
        journal.undo(moves)
    discard(note)
    for half in place.glob(".tmp-*"):
        discard(half)
    for moving in place.glob(f"{_MOVING}*"):
        for model in moving.iterdir() if not moving.is_symlink() else ():
            for home in (repository, place / "previous"):
                if not os.path.lexists(home / model.name):
                    model.rename(home / model.name)
                    break
        shutil.rmtree(moving, ignore_errors=True)
    for staging in place.glob("staging-*"):
        shutil.rmtree(staging, ignore_errors=True)
    return undone


def _unwritable(repository: Path, error: OSError) -> EnvironmentLacks:
    return EnvironmentLacks(
        f"cannot write {repository}; no changes were made",
        error.strerror or str(error),
        "free disk space, or check permissions",
    )


def remove(repository: Path) -> None:
    """Delete a run's own repository and the models kept next to it; if it is a link, only the link is deleted."""
    if not repository.is_symlink():
        discard(private_folder(repository))
    discard(repository)


def models_of(repository: Path) -> list[Path]:
    """Model folders that this package shipped."""
    return sorted(path.parent for path in repository.glob(f"*/{MANIFEST}"))
