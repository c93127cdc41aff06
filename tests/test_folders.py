"""Folders and files that appear whole or not at all, whatever happens on the way."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from secateur import folders
from secateur.errors import OutputError, OutputExistsError
from secateur.folders import claimed, new_folder, repair, unclaim, write_file


class Killed(BaseException):
    """Stands for SIGKILL: after it nothing of the process's own clean-up runs."""


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def hidden(folder: Path) -> list[str]:
    return [name for name in names(folder) if name.startswith(".")]


def write_folder(target: Path, text: str, *, overwrite: bool = False, then: type[BaseException] | None = None) -> None:
    with new_folder(target, overwrite=overwrite) as partial:
        (partial / "a").write_text(text)
        if then is not None:
            raise then


def partial_of(target: Path, process: int | str, host: str | None = None) -> Path:
    """The temporary folder of some other process."""
    host = folders._host() if host is None else host
    return target.with_name(f".{target.name}.partial-{host}-{process}-0123abcd")


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A folder with something in it."""
    (tmp_path / "out" / "inner").mkdir(parents=True)
    (tmp_path / "out" / "a").write_text("old a")
    (tmp_path / "out" / "inner" / "b").write_text("old b")
    return tmp_path / "out"


OLD = {"a": "old a", "inner/b": "old b"}


@pytest.fixture(params=["exchange", "two renames"])
def _swapping(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "two renames":
        monkeypatch.setattr(folders, "_exchange", lambda one, other: False)


def test_it_appears_at_the_end_whole_and_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, real, synced = tmp_path / "deep" / "er" / "out", os.fsync, set()

    def fsync(handle: int) -> None:
        synced.add((os.fstat(handle).st_ino, target.exists()))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    with new_folder(target) as partial:
        assert partial.parent == target.parent  # the same file system, or a rename would copy
        (partial / "a").write_text("new")
        (partial / "inner").mkdir()
        (partial / "inner" / "b").write_text("new")
        assert not target.exists()
    assert contents(target) == {"a": "new", "inner/b": "new"}
    assert names(target.parent) == ["out"]
    parts = (target, *target.rglob("*"))
    assert synced == {(part.stat().st_ino, False) for part in parts} | {(target.parent.stat().st_ino, True)}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, Killed])
@pytest.mark.parametrize("overwrite", [False, True])
def test_nothing_is_left_of_a_failure(tmp_path: Path, error: type[BaseException], overwrite: bool) -> None:
    if overwrite:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "a").write_text("old a")
    before = contents(tmp_path)
    with pytest.raises(error):
        write_folder(tmp_path / "out", "half", overwrite=overwrite, then=error)
    assert contents(tmp_path) == before
    assert names(tmp_path) == (["out"] if overwrite else [])


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_full_disk_leaves_nothing(tmp_path: Path, overwrite: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if overwrite:
        write_folder(tmp_path / "out", "old")
    before = contents(tmp_path)

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="No space left"):
        write_folder(tmp_path / "out", "new", overwrite=overwrite)
    with pytest.raises(OSError, match="No space left"):
        write_file(tmp_path / "file", "new")
    assert contents(tmp_path) == before
    assert not hidden(tmp_path)


def test_a_file_system_that_cannot_flush_folders_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, files = os.fsync, []

    def fsync(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        files.append(handle)
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    write_folder(tmp_path / "out", "new")
    assert contents(tmp_path / "out")
    assert files


@pytest.mark.parametrize("overwrite", [False, True])
def test_where_a_file_is_no_folder_comes(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "file").write_text("precious")
    for target, error in ((tmp_path / "file", OutputExistsError), (tmp_path / "file" / "out", OutputError)):
        with pytest.raises(error, match=target.name):
            write_folder(target, "new", overwrite=overwrite)
    assert contents(tmp_path) == {"file": "precious"}


def test_what_is_there_is_not_touched(old: Path) -> None:
    with pytest.raises(OutputExistsError, match="out exists"), new_folder(old):
        pytest.fail("the folder must not even be begun")
    assert contents(old) == OLD
    assert names(old.parent) == ["out"]


@pytest.mark.usefixtures("_swapping")
def test_overwriting_replaces_all(old: Path) -> None:
    with new_folder(old, overwrite=True) as partial:
        (partial / "c").write_text("new c")
        assert contents(old) == OLD
    assert contents(old) == {"c": "new c"}
    assert names(old.parent) == ["out"]


def test_an_exchange_has_no_moment_without_a_folder(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the system can swap two names, nothing is renamed in between; where it cannot, that is no error."""
    one, other = old.parent / "one", old.parent / "other"
    one.mkdir()
    assert not folders._exchange(one, other)
    other.mkdir()
    if not folders._exchange(one, other):
        pytest.skip("this file system cannot exchange two names")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", lambda *_: pytest.fail("it was renamed"))
        write_folder(old, "new", overwrite=True)
    assert contents(old) == {"a": "new"}
    monkeypatch.setattr(folders.ctypes, "CDLL", lambda name, **_: object())  # a libc without the call
    assert not folders._exchange(one, other)


def fail_after(renames: int, error: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the system be unable to exchange, and one rename fail after `renames` good ones.

    `Killed` fails all that follows, too, and lets no clean-up run, as if the process were gone.
    """
    real, done = Path.rename, []

    def rename(self: Path, target: Path) -> Path:
        done.append(target)
        if len(done) == renames + 1 or (error is Killed and len(done) > renames):
            raise error
        return real(self, target)

    def clean_up(path: Path, **options: Any) -> None:
        if len(done) >= renames:
            raise Killed

    monkeypatch.setattr(folders, "_exchange", lambda one, other: False)
    monkeypatch.setattr(Path, "rename", rename)
    if error is Killed:
        monkeypatch.setattr(folders.shutil, "rmtree", clean_up)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("renames", [0, 1])
def test_an_interrupt_while_swapping_leaves_the_old_one(
    old: Path, error: type[BaseException], renames: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process lives on, so it must not leave the repair to the next one: a reader does not repair."""
    with monkeypatch.context() as patch:
        fail_after(renames, error, patch)
        with pytest.raises((KeyboardInterrupt, OutputError)):
            write_folder(old, "new", overwrite=True)
    assert contents(old) == OLD
    assert not hidden(old.parent)


@pytest.mark.parametrize("renames", [0, 1, 2])
@pytest.mark.parametrize("next_command", [repair, lambda target: begin(target)])
def test_a_kill_while_swapping_is_repaired(
    old: Path, renames: int, next_command: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        fail_after(renames, Killed, patch)
        with pytest.raises(Killed), new_folder(old, overwrite=True) as partial:
            (partial / "c").write_text("new c")
    assert old.exists() == (renames != 1)  # the one moment without the folder
    pretend_dead(old)
    next_command(old)
    assert contents(old) == ({"c": "new c"} if renames == 2 else OLD)
    assert names(old.parent) == ["out"]
    for again in (old, old / "nowhere" / "out", old.parent / "other"):  # changes nothing
        repair(again)
    assert contents(old) == ({"c": "new c"} if renames == 2 else OLD)


def begin(target: Path) -> None:
    """Another command that would write there, and is refused."""
    with pytest.raises(OutputExistsError), new_folder(target):
        pytest.fail("the repaired folder is there")


def pretend_dead(target: Path) -> None:
    """The process that left something beside `target` was this one; name it after one that is gone."""
    for name in hidden(target.parent):
        if ".partial-" in name:
            target.with_name(name).rename(partial_of(target, dead_pid()))


def dead_pid() -> int:
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    return done.pid


def test_only_what_the_dead_left_is_cleared(tmp_path: Path) -> None:
    target, dead = tmp_path / "out", dead_pid()
    left = {
        "dead": partial_of(target, dead),
        "live": partial_of(target, os.getppid()),
        "own": partial_of(target, os.getpid()),
        "of another host": partial_of(target, dead, host="elsewhere"),
        "of another folder": partial_of(tmp_path / "outer", dead),
        "of nobody": partial_of(target, "x"),
        "visible": tmp_path / partial_of(target, dead).name[1:],
    }
    for folder in left.values():
        folder.mkdir()
        (folder / "a").write_text("x")
    write_folder(target, "new")
    assert {name for name, folder in left.items() if not folder.exists()} == {"dead"}
    assert contents(target) == {"a": "new"}


def test_a_process_of_another_user_is_alive(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def not_ours(pid: int, signal: int) -> None:
        raise PermissionError

    theirs = partial_of(tmp_path / "out", 77)
    theirs.mkdir()
    monkeypatch.setattr(os, "kill", not_ours)
    repair(tmp_path / "out")
    assert theirs.exists()


def test_two_writers_do_not_share_a_partial_folder(tmp_path: Path) -> None:
    with new_folder(tmp_path / "out", overwrite=True) as one:
        (one / "a").write_text("one")
        write_folder(tmp_path / "out", "two", overwrite=True)
        assert contents(tmp_path / "out") == {"a": "two"}
        assert contents(one) == {"a": "one"}
    assert contents(tmp_path / "out") == {"a": "one"}
    assert names(tmp_path) == ["out"]


# --- single files ---


def test_a_file_is_old_or_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "secateur.json"
    write_file(path, "old ü\n")
    assert path.read_text(encoding="utf-8") == "old ü\n"

    def killed(handle: int) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", killed)
        with pytest.raises(Killed):
            write_file(path, "new")
    assert path.read_text(encoding="utf-8") == "old ü\n"
    write_file(path, "new")
    assert path.read_text() == "new"
    assert names(tmp_path) == ["secateur.json"]


def test_a_file_is_on_disk_before_its_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    real = os.fsync

    def fsync(handle: int) -> None:
        real(handle)
        seen.append((tmp_path / "a").read_text() + " while syncing " + Path(f"/proc/self/fd/{handle}").read_text())

    (tmp_path / "a").write_text("old")
    monkeypatch.setattr(os, "fsync", fsync)
    write_file(tmp_path / "a", "new")
    assert seen[0] == "old while syncing new"


def test_names_with_special_characters(tmp_path: Path) -> None:
    """A name that a glob would read as a pattern, with the marks that part a temporary name."""
    target = tmp_path / "out-[1]*.partial-x"
    innocent = partial_of(tmp_path / "out-1x.partial-x", dead_pid())
    innocent.mkdir()
    stale = partial_of(target, dead_pid())
    stale.mkdir()
    write_folder(target, "new")
    assert contents(target) == {"a": "new"}
    assert innocent.exists()
    assert not stale.exists()


def test_a_link_is_followed(old: Path) -> None:
    """The folder behind the link is replaced, not the link."""
    link = old.parent / "elsewhere" / "link"
    link.parent.mkdir()
    link.symlink_to(old)
    with pytest.raises(OutputExistsError):
        write_folder(link, "new")
    write_folder(link, "new", overwrite=True)
    assert link.is_symlink()
    assert contents(old) == contents(link) == {"a": "new"}
    assert names(link.parent) == ["link"]


def test_what_appeared_meanwhile_is_not_touched(tmp_path: Path) -> None:
    target = tmp_path / "out"

    def race() -> None:
        with new_folder(target) as partial:
            (partial / "a").write_text("late")
            write_folder(target, "early")

    with pytest.raises(OutputExistsError):
        race()
    assert contents(target) == {"a": "early"}
    assert not hidden(tmp_path)


def test_where_the_system_is_not_posix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows has no locks by flock, no sync of what is open for reading, no exchange; its signal 0 is Ctrl-C."""

    def never(*args: Any) -> None:
        raise OSError(errno.EBADF, "not there")

    def no_such_library(name: None, **options: Any) -> None:
        raise TypeError(name)

    left = tmp_path / f".out.partial-{folders._writer()}-1"
    left.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(folders, "_POSIX", False)
        patch.setitem(sys.modules, "fcntl", None)
        patch.setattr(folders.ctypes, "CDLL", no_such_library)
        for name in ("fsync", "kill"):
            patch.setattr(os, name, never)
        with claimed(tmp_path / "out"):
            write_folder(tmp_path / "out", "old")
            write_folder(tmp_path / "out", "new", overwrite=True)
    assert (contents(tmp_path / "out"), names(tmp_path)) == ({"a": "new"}, [left.name, "out"])


def test_what_a_killed_writer_of_a_file_left_goes_with_the_next(tmp_path: Path) -> None:
    target, live = tmp_path / "table.csv", partial_of(tmp_path / "table.csv", os.getppid())
    for left in (partial_of(target, dead_pid()), live):
        left.write_text("ha")
    write_file(target, "whole")
    assert {path.name for path in tmp_path.iterdir()} == {target.name, live.name}
    assert target.read_text() == "whole"


def test_a_claim_that_a_killed_process_left_is_taken_away_and_no_other(tmp_path: Path) -> None:
    (tmp_path / ".out.claim").touch()
    unclaim(tmp_path / "out")
    assert not hidden(tmp_path)
    with claimed(tmp_path / "out"):
        unclaim(tmp_path / "out")
        assert hidden(tmp_path)
