"""Folders that appear whole or not at all."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from secateur.errors import OutputBusyError, OutputError, OutputExistsError

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_POSIX = os.name == "posix"
_TAKEN = {errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR}


@contextmanager
def new_folder(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Give a temporary folder beside `target`, which takes its place when the context ends well.

    Everything is synced to disk before the name changes. On any exception, an interrupt included, the temporary folder
    is removed and `target` is as it was. A killed process leaves at most a hidden folder, which `repair` clears.

    Raises:
        OutputExistsError: `target` exists and is not to be overwritten, or appeared meanwhile.
        OutputError: the folder cannot be written.
    """
    target = resolved(target)
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
        if error.errno in _TAKEN and target.exists() and not overwrite:  # between the last look and the rename
            raise OutputExistsError(f"{target} appeared meanwhile; nothing was overwritten") from error
        raise OutputError(
            f"{target} could not be written: {error.strerror or error}; nothing was left behind"
        ) from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


@contextmanager
def disk_full_as_oserror() -> Iterator[None]:
    """The libraries in Rust report a full disk in exceptions of their own: make it the usual one."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            if os.strerror(number) in str(error) or f"os error {number})" in str(error):
                raise OSError(number, os.strerror(number)) from error
        raise


def resolved(target: Path) -> Path:
    """The folder that is meant, through links: the folder itself is replaced, on its own disk.

    Raises:
        OutputError: no folder can have that name.
    """
    try:
        target = target.resolve()
        target.exists()
        str(target).encode("utf-8")  # the libraries that write models and tokenizers take no other names
    except (OSError, ValueError, RuntimeError) as error:  # too long, with a NUL, a loop of links
        raise OutputError(f"{str(target)[:200]!r} can be no folder: {error}"[:400]) from error
    return target


def require_space(target: Path, needs_bytes: int) -> None:
    """Raise OutputError unless the disk of `target` has that much room, before hours of work and not after them."""
    parent = next(path for path in resolved(target).parents if path.exists())
    if (free := shutil.disk_usage(parent).free) < needs_bytes:
        raise OutputError(
            f"not enough room for {target}: {free / 1e6:,.0f} MB are free in {parent}, and about "
            f"{needs_bytes / 1e6:,.0f} MB needed; free some, or choose a folder on another disk"
        )


@contextmanager
def claimed(target: Path) -> Iterator[None]:
    """Keep other processes of this host off `target` for the time of the context; a killed one's claim ends with it.

    So that of two runs into one folder the second is refused before its work and not after. Parents are made, which
    also shows early whether they can be, and unmade if nothing came into them.

    Raises:
        OutputBusyError: another process is about to write it.
        OutputError: it cannot be written.
    """
    target = resolved(target)
    made = [parent for parent in target.parents if not parent.exists()]  # the innermost first
    lock = _claim(target)
    try:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            handle = _lock(lock)
        except BlockingIOError as error:
            raise OutputBusyError(
                f"another run is about to write {target}; wait for it to end, or choose another folder"
            ) from error
        except OSError as error:
            raise OutputError(f"{target} cannot be written: {error.strerror or error}") from error
        try:
            yield
        finally:
            if not _POSIX:  # Windows removes no file that is open
                os.close(handle)
            lock.unlink(missing_ok=True)
            if _POSIX:  # whoever gets the lock next sees that its file is gone
                os.close(handle)
    finally:
        for parent in made:
            with suppress(OSError):  # not empty
                parent.rmdir()


def unclaim(target: Path) -> None:
    """Remove what a killed process's claim left, where nobody has claimed it since."""
    if _claim(target).exists():
        with suppress(OutputError), claimed(target):
            pass


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock file of this host, which stays; BlockingIOError if another process holds it. A kill lets it go."""
    handle = _lock(path)
    try:
        yield
    finally:
        os.close(handle)


def _claim(target: Path) -> Path:
    return target.parent / f".{target.name}.claim"


def _lock(path: Path) -> int:
    """A handle of a file that no other process has locked; BlockingIOError if one has."""
    try:
        import fcntl
    except ImportError:  # not POSIX: there two runs are told apart by the last rename only
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(os.fstat(handle), path.stat()):
                return handle
        except BlockingIOError:
            os.close(handle)
            raise
        except OSError:  # a file system without locks
            return handle
        os.close(handle)  # its owner took it away between our two steps: this lock is of no file any more


def write_file(path: Path, text: str) -> None:
    """Write a file atomically: whoever reads it sees the old text or the new one."""
    _clear_partials(path)
    partial = path.with_name(f".{path.name}.partial-{_writer()}-{uuid.uuid4().hex[:8]}")
    try:
        with partial.open("w", encoding="utf-8", newline="\n") as file:
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
    _clear_partials(target)


def _clear_partials(target: Path) -> None:
    """Remove what killed writers of a folder or file left."""
    prefix = f".{target.name}.partial-"
    for partial in target.parent.iterdir():
        if not partial.name.startswith(prefix):
            continue
        host, _, process = partial.name[len(prefix) :].rpartition("-")[0].rpartition("-")
        if host == _host() and process.isdigit() and not _alive(int(process)):
            if partial.is_dir():
                shutil.rmtree(partial, ignore_errors=True)
            else:
                partial.unlink(missing_ok=True)


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
    except (OSError, AttributeError, TypeError):  # TypeError: Windows has no library that is None
        return False
    return bool(done == 0)


def _aside(target: Path) -> Path:
    return target.parent / f".{target.name}.secateur-old"


def _alive(pid: int) -> bool:
    if not _POSIX:  # there signal 0 is Ctrl-C; what a killed writer left stays
        return True
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
    if not _POSIX:  # Windows flushes only what is open for writing
        return
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError:  # some systems do not open folders; then there is nothing to sync either
        return
    try:
        os.fsync(handle)
    except OSError as error:  # of folders some file systems cannot do it
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):
            raise
    finally:
        os.close(handle)
