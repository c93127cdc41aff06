"""Folders that appear whole or not at all."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from secateur.errors import OutputError, OutputExistsError

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


@contextmanager
def new_folder(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Give a temporary folder beside `target`, which takes its place when the context ends well.

    Everything is synced to disk before the name changes. On any exception, an interrupt included, the temporary folder
    is removed and `target` is as it was. A killed process leaves at most a hidden folder, which `repair` clears.

    Raises:
        OutputExistsError: `target` exists and is not to be overwritten, or appeared meanwhile.
        OutputError: the folder cannot be written.
    """
    target = target.resolve()  # through links: the folder itself is replaced, on its own disk
    try:
        repair(target)
        if target.is_file():
            raise OutputExistsError(f"{target} is a file; choose another folder")
        if target.exists() and not overwrite:
            raise OutputExistsError(f"{target} exists; choose another folder, or ask for it to be overwritten")
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.parent / f".{target.name}.partial-{_writer()}-{uuid.uuid4().hex[:8]}"
        partial.mkdir()
    except OSError as error:
        raise OutputError(f"{target} cannot be written: {error.strerror or error}") from error
    try:
        yield partial
        _sync(partial)
        _take_place(partial, target, overwrite)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise OutputError(
            f"{target} could not be written: {error.strerror or error}; nothing was left behind"
        ) from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def write_file(path: Path, text: str) -> None:
    """Write a file atomically: whoever reads it sees the old text or the new one."""
    partial = path.with_name(f".{path.name}.partial-{_writer()}-{uuid.uuid4().hex[:8]}")
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
    """Finish or undo what a killed writer left beside `target`; for writers, before they begin.

    Temporary folders of other hosts are left alone, since their processes cannot be asked.
    """
    target = target.resolve()
    if not target.parent.is_dir():
        return
    aside = _aside(target)
    if aside.exists() and target.exists():
        shutil.rmtree(aside)
    elif aside.exists():
        aside.rename(target)
    prefix = f".{target.name}.partial-"
    for partial in target.parent.iterdir():
        if not partial.name.startswith(prefix):
            continue
        host, _, process = partial.name[len(prefix) :].rpartition("-")[0].rpartition("-")
        if host == _host() and process.isdigit() and not _alive(int(process)):
            shutil.rmtree(partial, ignore_errors=True)


def _take_place(partial: Path, target: Path, overwrite: bool) -> None:
    if not overwrite:
        if target.exists():
            raise OutputExistsError(f"{target} appeared meanwhile; nothing was overwritten")
        # Between the check and the rename another writer may come: on a POSIX system the rename then fails, because
        # a folder only replaces an empty one.
        partial.rename(target)
    elif not target.exists():
        partial.rename(target)
    elif _exchange(partial, target):
        shutil.rmtree(partial, ignore_errors=True)
    else:  # between the two renames `target` is absent; `repair` knows what to do
        aside = _aside(target)
        try:
            target.rename(aside)
            partial.rename(target)
        except BaseException:
            if not target.exists():
                aside.rename(target)
            raise
        shutil.rmtree(aside, ignore_errors=True)
    _sync_entry(target.parent)


def _writer() -> str:
    return f"{_host()}-{os.getpid()}"


def _host() -> str:
    return "".join(c for c in platform.node() if c.isalnum())[:32] or "host"


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
