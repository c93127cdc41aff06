"""What is ours in the cache folder: by name, how large, since when; and taking it out."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from msgspec import Struct

from secateur.assets.cache import cache_dir, is_abandoned, scratch_folders
from secateur.assets.demo import MODEL_FOLDER, TEXT_FILE, demo_files
from secateur.assets.downstream import FOLDER, downstream_files
from secateur.errors import OutputError, UnknownNameError

Kind = Literal["model", "text", "rows", "scratch"]


class Cached(Struct, frozen=True, kw_only=True):
    """Something in the cache folder.

    Attributes:
        name: its path in there.
        kind: a model, a text, rows of tasks, or the scratch folder of a fetch.
        fetched_by: the name by which `secateur fetch` gets it; None of a scratch folder.
        busy: a fetch may still be writing it; it stays.
        bytes: of its files.
        age_s: seconds since the last of them was written.
    """

    name: str
    kind: Kind
    fetched_by: str | None
    busy: bool
    bytes: int
    age_s: float


@dataclass(frozen=True)
class _Ours:
    """Files of one thing; the one without which it is no good comes first."""

    name: str
    kind: Kind
    fetched_by: str | None
    files: list[Path]
    busy: bool = False

    def about(self) -> Cached:
        states = []
        for file in self.files:
            with contextlib.suppress(OSError):  # a fetch that ends meanwhile takes its scratch away
                states.append(file.lstat())
        age = time.time() - max((state.st_mtime for state in states), default=0.0)
        return Cached(
            name=self.name, kind=self.kind, fetched_by=self.fetched_by, busy=self.busy,
            bytes=sum(state.st_size for state in states), age_s=max(0.0, age),
        )  # fmt: skip


def list_cached(cache: Path | None = None) -> list[Cached]:
    """What secateur has put into the cache folder, and nothing else that lies there.

    Models and texts of the hub are not among it: they lie in the hub's own cache.
    """
    return [each.about() for each in _ours(cache_dir(cache))]


def clear_cached(
    cache: Path | None = None, names: Sequence[str] | None = None, *, older_than_s: float = 0.0
) -> list[Cached]:
    """Take things out of the cache folder; return what is gone. What is busy stays, and what is not ours.

    Args:
        names: of things, or by which `secateur fetch` gets them; everything if None.
        older_than_s: only what was written at least so many seconds ago.

    Raises:
        UnknownNameError: nothing there is called so.
        OutputError: a file cannot be removed.
    """
    root, gone = cache_dir(cache), []
    ours = list(_ours(root))
    known = {name for each in ours for name in (each.name, each.fetched_by) if name}
    for name in names or ():
        if name not in known:
            raise UnknownNameError.of("thing in the cache", name, known)
    for each in ours:
        about = each.about()
        meant = names is None or bool({each.name, each.fetched_by} & set(names))
        if meant and not each.busy and about.age_s >= older_than_s:
            try:
                _remove(root, each)
            except OSError as error:
                raise OutputError(f"{root / each.name} cannot be removed: {error.strerror or error}") from error
            gone.append(about)
    return gone


def _ours(root: Path) -> Iterator[_Ours]:
    model, text = demo_files(root)
    fetched = [
        _Ours(MODEL_FOLDER.as_posix(), "model", "demo", model), _Ours(TEXT_FILE.as_posix(), "text", "demo", text),
        _Ours(FOLDER, "rows", "tasks", downstream_files(root)),
    ]  # fmt: skip
    for each in fetched:
        files = [
            file for file in each.files if file.resolve().is_relative_to(root.resolve())
        ]  # not what a link leads to
        if files:
            yield replace(each, files=files)
    for folder in scratch_folders(root):
        yield _Ours(folder.name, "scratch", None, [folder, *folder.rglob("*")], busy=not is_abandoned(folder))


def _remove(root: Path, ours: _Ours) -> None:
    """Remove the files, and folders that are empty then."""
    if ours.kind == "scratch":
        shutil.rmtree(ours.files[0])
        return
    for file in ours.files:
        file.unlink(missing_ok=True)
    for folder in sorted({parent for file in ours.files for parent in file.parents}, reverse=True):
        if root in folder.parents:
            with contextlib.suppress(OSError):  # something else lies in it
                os.rmdir(folder)
