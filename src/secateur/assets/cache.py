"""The cache folder: where it is, and how files get into it whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from secateur.errors import FetchError

_SCRATCH_PREFIX = ".tmp-"
_SCRATCH_MAX_AGE_S = 24 * 3600
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT}
_TAKEN = {errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR}


def cache_dir(explicit: Path | None = None) -> Path:
    """The folder for fetched models and texts; it need not exist yet.

    The given folder, else $SECATEUR_CACHE, else $XDG_CACHE_HOME/secateur, else ~/.cache/secateur.
    """
    if explicit is not None:
        return Path(explicit).expanduser().absolute()
    if own := os.environ.get("SECATEUR_CACHE"):
        return Path(own).expanduser().absolute()
    shared = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification says that a relative path is to be ignored.
    base = Path(shared) if os.path.isabs(shared) else Path("~/.cache").expanduser()
    return base / "secateur"


@contextlib.contextmanager
def scratch(cache: Path, *, needs_bytes: int) -> Iterator[Path]:
    """A temporary folder inside the cache (so that a rename out of it is atomic), removed at the end.

    Raises FetchError if the disk is, or becomes, too full, or the cache cannot be written.
    """
    try:
        cache.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(cache)
        if (free := shutil.disk_usage(cache).free) < needs_bytes:
            raise disk_full(cache, f"{free / 1e6:,.0f} MB are free, {needs_bytes / 1e6:,.0f} MB needed")
        # Not tempfile.mkdtemp: its mode 0700 would go along with the rename, into a cache that may be shared.
        folder = cache / f"{_SCRATCH_PREFIX}{os.getpid()}-{secrets.token_hex(4)}"
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        if error.errno in _DISK_FULL:
            raise disk_full(cache, str(error)) from error
        raise FetchError(
            f"could not fill the cache folder {cache}: {error}. Choose another one by --cache-dir or SECATEUR_CACHE."
        ) from error


def disk_full(cache: Path, detail: str) -> FetchError:
    """The error for a full disk, with its way out."""
    return FetchError(
        f"not enough room in the cache folder {cache} ({detail}). "
        "Free some space, or choose a folder on another disk by --cache-dir or SECATEUR_CACHE."
    )


def publish(made: Path, final: Path, usable: Callable[[Path], bool]) -> None:
    """Move a finished folder to its place in the cache, atomically.

    If another process was faster, its copy stays if `usable` and ours is dropped with the scratch folder; an
    unusable one (an older pin, a damaged copy) makes way.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    for attempt in range(3):
        try:
            os.rename(made, final)
            return
        except OSError as error:
            if error.errno not in _TAKEN:
                raise
        if usable(final):
            return
        with contextlib.suppress(FileNotFoundError):  # another process moved it away first
            os.rename(final, made.with_name(f"{made.name}.old{attempt}"))
    raise FetchError(f"{final} keeps being replaced by other processes; try again when they have finished.")


def _remove_abandoned(cache: Path) -> None:
    """Remove scratch folders of processes that were killed; a living one is never a day old."""
    for folder in cache.glob(f"{_SCRATCH_PREFIX}*"):
        with contextlib.suppress(OSError):
            if time.time() - folder.stat().st_mtime > _SCRATCH_MAX_AGE_S:
                shutil.rmtree(folder, ignore_errors=True)
