"""Folders that appear whole or not at all."""

from __future__ import annotations

import ctypes
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from secateur.errors import OutputExistsError

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


@contextmanager
def new_folder(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Give a temporary folder beside `target`, which takes its place when the context ends well.

    Everything is synced to disk before the name changes. On any exception, an interrupt included, the temporary folder
    is removed and `target` is as it was. A killed process leaves at most a hidden folder, which `repair` clears.

    Raises:
        OutputExistsError: `target` exists and is not to be overwritten.
    """
    repair(target)
    if target.exists() and not overwrite:
        raise OutputExistsError(f"{target} exists; choose another folder, or ask for it to be overwritten")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.parent / f".{target.name}.partial-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    partial.mkdir()
    try:
        yield partial
        _sync(partial)
        _take_place(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def write_file(path: Path, text: str) -> None:
    """Write a file atomically: whoever reads it sees the old text or the new one."""
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}-{uuid.uuid4().hex[:8]}")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def repair(target: Path) -> None:
    """Finish or undo what a killed process left beside `target`."""
    if not target.parent.is_dir():
        return
    aside = _aside(target)
    if aside.exists():
        if target.exists():
            shutil.rmtree(aside)
        else:
            aside.rename(target)
    for partial in target.parent.glob(f".{target.name}.partial-*"):
        owner = partial.name.split("partial-")[1].split("-")[0]
        if not (owner.isdigit() and _alive(int(owner))):
            shutil.rmtree(partial, ignore_errors=True)


def _take_place(partial: Path, target: Path) -> None:
    if not target.exists():
        partial.rename(target)
    elif _exchange(partial, target):
        shutil.rmtree(partial, ignore_errors=True)
    else:  # between the two renames `target` is absent; `repair` knows what to do
        aside = _aside(target)
        target.rename(aside)
        partial.rename(target)
        shutil.rmtree(aside, ignore_errors=True)
    _sync_entry(target.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one step; False where the system cannot."""
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        done = libc.renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE)
    except (OSError, AttributeError):
        return False
    return bool(done == 0)


def _aside(target: Path) -> Path:
    return target.parent / f".{target.name}.old"


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        _sync_entry(path)
    _sync_entry(folder)


def _sync_entry(path: Path) -> None:
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError:  # some systems do not open folders; then there is nothing to sync either
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
