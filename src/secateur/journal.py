"""A run on disk: `OUT.run`, a folder of one job's own, and in it a journal from which a killed run goes on.

    run.json            whose the folder is: the parts of the job's identity
    journal.jsonl       a line per costly step: its key, its result, what it took; each with a checksum, fsynced
    tensors/SHA256.safetensors   the tensors of a step's result, named by the sha256 of the file
    blocks/             what a streamed model has edited; nothing that a later process reads

A line counts when it is whole and its tensors are what it says. The journal counts up to its first line that does not:
what a kill tore, or a disk flipped, is computed again together with all that came after it; all, where states are lost
that cannot be computed again to the bit (`NEEDED`).
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from secateur.errors import JournalError, OutputBusyError, OutputError
from secateur.folders import disk_full_as_oserror, locked, resolved, write_file
from secateur.run import NEEDED
from secateur.sharing import Shared, Spent
from secateur.version import __version__

Identity = Mapping[str, Any]  # the parts of a job's identity by name, in their order: JSON

_JOB, _JOURNAL, _TENSORS, _LOCK = "run.json", "journal.jsonl", "tensors", "lock"
_BLOCKS = "blocks"
_OURS = {_JOB, _JOURNAL, _TENSORS, _LOCK, _BLOCKS}
_DIGITS = 16  # of a line's checksum
_STATES = "states/"  # how the keys begin of states of walks, which are replaced from time to time
_STEP_AT = len('{"check": "') + _DIGITS + len('", "step": ')
_SHOWN = 60  # characters of a part that differs
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

logger = logging.getLogger(__name__)


# --- the folder ---


def run_folder(out: Path) -> Path:
    """Where a run that will write `out` keeps what it needs to go on."""
    out = resolved(out)
    return out.with_name(f"{out.name}.run")


def fingerprint(identity: Identity) -> str:
    """sha256 over the parts of an identity."""
    return hashlib.sha256(json.dumps(list(identity.values()), sort_keys=True).encode()).hexdigest()


@contextmanager
def claimed_run(folder: Path, identity: Identity, *, overwrite: bool = False) -> Iterator[None]:
    """Hold the run folder of a job for the time of the context: made, or taken up again.

    Args:
        overwrite: another job's run there is thrown away.

    Raises:
        JournalError: it is another job's, says in what; or it holds something else.
        OutputBusyError: another process is in it.
        OutputError: it cannot be written.
    """
    _require_ours(folder)
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(folder / _LOCK))
            if _is_another(folder, identity, overwrite):
                _clear(folder)
            stated = {"secateur": __version__, "fingerprint": fingerprint(identity), "identity": _parts(identity)}
            write_file(folder / _JOB, json.dumps(stated, indent=1) + "\n")
        except BlockingIOError as error:
            raise OutputBusyError(f"another process is at work in {folder}; wait for it to end") from error
        except OSError as error:
            raise OutputError(f"{folder} cannot be written: {error.strerror or error}") from error
        yield


@contextmanager
def scratch_in(folder: Path) -> Iterator[Path]:
    """Where, in a run folder, a streamed model may put what it need not find again; what a killed one left goes.

    Raises:
        JournalError: it holds something else.
    """
    _require_ours(folder)
    blocks = folder / _BLOCKS
    shutil.rmtree(blocks, ignore_errors=True)
    try:
        yield blocks
    finally:
        shutil.rmtree(blocks, ignore_errors=True)
        with suppress(OSError):  # it is not there, or holds a run
            folder.rmdir()


def taken_bytes(folder: Path) -> int:
    """What a run folder takes on the disk by now."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def forget(folder: Path, of: Identity | None = None) -> None:
    """Remove a run folder, if it is one and no process is in it.

    Args:
        of: only if it is this job's.
    """
    stated = _stated(folder)
    if not folder.is_dir() or (stated is None and _others_in(folder)):
        return
    if stated is not None and of is not None and stated.get("fingerprint") != fingerprint(of):
        return
    with suppress(OSError), locked(folder / _LOCK):
        _clear(folder, last=_JOB)  # a kill leaves something that is known for a run's again
        shutil.rmtree(folder, ignore_errors=True)


def _is_another(folder: Path, identity: Identity, overwrite: bool) -> bool:
    """Whether what the folder holds is to be thrown away; it is refused where it is not."""
    stated = _stated(folder)
    if stated is None:
        return True  # killed before it said whose it is
    if stated.get("fingerprint") == fingerprint(identity):
        return False
    if not _others_in(folder) and not Journal(folder, repair=False).entries:
        return True  # nothing is lost
    if overwrite:
        return True
    had, wanted = stated.get("identity") or {}, _parts(identity)
    changed = [
        f"{name} ({had.get(name, 'none')}, now {wanted.get(name, 'none')})"
        for name in {**had, **wanted}
        if had.get(name) != wanted.get(name)
    ]
    raise JournalError(
        f"{folder} has an unfinished run of another job; changed: {', '.join(changed) or 'what it is'}. Give the same "
        "again to go on with it, choose another --out, or give --overwrite to throw it away"
    )


def _require_ours(folder: Path) -> None:
    if folder.exists() and _stated(folder) is None and (not folder.is_dir() or _others_in(folder)):
        raise JournalError(f"{folder} holds something else than an unfinished run; move it away")


def _others_in(folder: Path) -> bool:
    """Whether more than a journal lies there: a recovery's checkpoints, or what is no run's."""
    partials = tuple(f".{name}.partial-" for name in (_JOB, _JOURNAL))  # of a killed `write_file`
    return any(path.name not in _OURS and not path.name.startswith(partials) for path in folder.iterdir())


def _clear(folder: Path, last: str = "") -> None:
    """Remove what lies there, by an earlier process. Args: last: what goes last."""
    for path in sorted(folder.iterdir(), key=lambda path: path.name == last):
        if path.name in (_LOCK, _BLOCKS):  # this process's own
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _stated(folder: Path) -> dict[str, Any] | None:
    try:
        stated = json.loads((folder / _JOB).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return stated if isinstance(stated, dict) else None


def _parts(identity: Identity) -> dict[str, str]:
    """An identity for readers: options by name, what is long by its sha256."""
    parts: dict[str, str] = {}
    for name, part in identity.items():
        inner = {f"{name} {key}": value for key, value in part.items()} if isinstance(part, Mapping) else {name: part}
        for key, value in inner.items():
            text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
            whole = len(text) <= _SHOWN
            parts[key] = text if whole else f"sha256 {hashlib.sha256(text.encode()).hexdigest()[:_DIGITS]}"
    return parts


# --- the journal ---


@dataclass(frozen=True)
class _Entry:
    """A step's result as the journal has it: where tensors stand, `{"tensor": name, "device": device}`."""

    value: Any
    tensors: str | None  # the sha256 of their file
    spent: Spent | None


class Journal:
    """The steps of a folder's runs, by job and key. Only whoever holds the folder (`claimed_run`) may add to it.

    Args:
        folder: made when something is put.
        repair: cut what is damaged off; else it is passed over, since another process may be writing it.
    """

    def __init__(self, folder: Path, *, repair: bool = True) -> None:
        self.folder = folder
        self.entries: dict[tuple[str, str], _Entry] = {}
        self._path = folder / _JOURNAL
        self._end = 0  # bytes of the lines that count
        self._read()
        if repair and self._path.exists() and self._path.stat().st_size > self._end:
            logger.warning("%s: its end is damaged, and is computed again", self._path)
            with self._path.open("r+b") as file:
                file.truncate(self._end)

    def _read(self) -> None:
        with suppress(FileNotFoundError), self._path.open("rb") as file:
            for line in file:
                if (known := _parsed(line)) is None or not (known[0][1].startswith(_STATES) or self._whole(known[1])):
                    break
                self.entries[known[0]] = known[1]
                self._end += len(line)
        states = {place: entry for place, entry in self.entries.items() if place[1].startswith(_STATES)}
        lost = [place for place, entry in states.items() if not self._whole(entry)]
        if any(key.startswith(_STATES + NEEDED) for _, key in lost):
            self.entries, self._end = {}, 0
        for place in lost:
            self.entries.pop(place, None)  # a run goes on without

    def _whole(self, entry: _Entry) -> bool:
        if entry.tensors is None:
            return True
        try:
            with self._file(entry.tensors).open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest() == entry.tensors
        except OSError:
            return False

    @property
    def standing(self) -> str:
        """How far it is, in words."""
        steps = [key for _, key in self.entries if not key.startswith(_STATES)]
        return f"{len(steps)} steps are kept" + (f", the last one '{steps[-1]}'" if steps else "")

    def get(self, job: str, key: str) -> Any:
        """
        Raises:
            KeyError: the step is not there.
        """
        entry = self.entries[job, key]
        tensors = load_file(self._file(entry.tensors)) if entry.tensors else {}  # mapped: the system may drop its pages
        return _restored(entry.value, tensors)

    def put(self, job: str, key: str, value: Any, spent: Spent | None = None) -> None:
        """Add a step, or replace the states of this key; it is on the disk when this returns.

        Raises:
            OutputError: the disk is full, or the folder cannot be written. What was there before stays whole.
        """
        tensors: dict[str, Tensor] = {}
        stored = _stored(value, tensors)
        try:
            (self.folder / _TENSORS).mkdir(parents=True, exist_ok=True)
            name = self._write_tensors(tensors) if tensors else None
            step = {"job": job, "key": key, "value": stored, "tensors": name, "spent": spent}
            line = _line(json.dumps(step)).encode()
            with self._path.open("r+b" if self._path.exists() else "w+b") as file:
                file.seek(self._end)
                file.truncate()  # of a line that did not fit
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            full = " (free some room)" if error.errno in _DISK_FULL else ""
            raise OutputError(
                f"{self.folder} cannot be written: {error.strerror or error}{full}; {self.standing}, and the same "
                "command goes on from there"
            ) from error
        self._end += len(line)
        replaced = self.entries.get((job, key))
        self.entries[job, key] = _Entry(stored, name, spent)
        if replaced is not None and replaced.tensors not in {entry.tensors for entry in self.entries.values()}:
            with suppress(OSError):  # Windows: it may still be mapped
                self._file(str(replaced.tensors)).unlink()

    def drop(self, goes: Callable[[str, str], bool]) -> None:
        """Remove entries by job and key, and all tensors that nobody names then. A kill leaves the journal as it was or
        as it is to be, and at most tensors that the next time takes.

        Raises:
            OSError: the folder cannot be written; the journal is as it was.
        """
        lines = self._path.read_bytes()[: self._end].splitlines(keepends=True) if self._end else []
        stay = [line for line in lines if (known := _parsed(line)) is not None and not goes(*known[0])]
        if len(stay) < len(lines):
            write_file(self._path, b"".join(stay).decode())
        self.entries = {place: entry for place, entry in self.entries.items() if not goes(*place)}
        self._end = sum(map(len, stay))
        named = {entry.tensors for entry in self.entries.values()}
        for path in (self.folder / _TENSORS).glob("*.safetensors"):
            if path.stem not in named:
                with suppress(OSError):  # Windows: it may still be mapped
                    path.unlink()

    def _write_tensors(self, tensors: dict[str, Tensor]) -> str:
        partial = self.folder / _TENSORS / "partial"
        with disk_full_as_oserror():
            save_file(tensors, partial)
        with partial.open("rb+") as file:  # Windows flushes only what is open for writing
            os.fsync(file.fileno())
            name = hashlib.file_digest(file, "sha256").hexdigest()
        partial.replace(self._file(name))  # also where one of the name lies there: a kill or the disk may have hurt it
        return name

    def _file(self, name: str) -> Path:
        return self.folder / _TENSORS / f"{name}.safetensors"


class Journaled(Shared):
    """The store of one job's run in a journal; it sees also, of other jobs there, the steps that hold for all."""

    def __init__(self, journal: Journal, beginning: str | None = None) -> None:
        super().__init__(beginning)
        self.journal = journal
        self._jobs: dict[str, str] = {}  # by key, the job whose step it is
        self._see()

    @contextmanager
    def held(self, identity: Identity) -> Iterator[None]:
        """Take the journal's folder for the time of the context, as it is by now; what is another's there goes.

        Raises:
            OutputBusyError: another process is in it.
        """
        with claimed_run(self.journal.folder, identity, overwrite=True):
            self.journal, self.identity = Journal(self.journal.folder), None
            self._see()
            yield

    def drop(self) -> None:
        """Forget what only the job has that it is open for, whose result lies elsewhere by now."""
        with suppress(OSError):  # it only takes room
            self.journal.drop(lambda job, key: job == self.identity and not self._holds(key))
            self._see()

    def look(self) -> None:
        """See what other processes have added, without taking the folder."""
        self.journal = Journal(self.journal.folder, repair=False)
        self._see()

    def open(self, identity: str) -> None:
        self.identity = identity
        self._see()

    def _see(self) -> None:
        entries = self.journal.entries
        self._jobs = {key: job for job, key in entries if job == self.identity or self._holds(key)}
        known = {key: entries[job, key].spent for key, job in self._jobs.items()}
        self.spent = {key: spent for key, spent in known.items() if spent is not None}

    def get(self, key: str) -> Any:
        return self.journal.get(self._jobs[key], key)

    def put(self, key: str, value: Any) -> None:
        assert self.identity is not None, "a store is opened for a job before it is used"
        self.journal.put(self.identity, key, value, self.spent.get(key))
        self._jobs[key] = self.identity

    def put_states(self, key: str, value: Any) -> None:
        assert self.identity is not None, "a store is opened for a job before it is used"
        self.journal.put(self.identity, _STATES + key, value)

    def get_states(self, key: str) -> Any:
        return self.journal.get(str(self.identity), _STATES + key)

    def copy(self) -> Journaled:
        return Journaled(self.journal, self.beginning)

    def sibling(self, beginning: str | None) -> Journaled:
        return Journaled(self.journal, beginning)


def _line(step: str) -> str:
    return f'{{"check": "{hashlib.sha256(step.encode()).hexdigest()[:_DIGITS]}", "step": {step}}}\n'


def _parsed(line: bytes) -> tuple[tuple[str, str], _Entry] | None:
    """A line's job and key, and its entry; None if it is torn or damaged."""
    text = line.decode("utf-8", "replace")
    step = text[_STEP_AT:-2]
    if text != _line(step):
        return None
    read = json.loads(step)
    spent = None if read["spent"] is None else Spent(*read["spent"])
    return (read["job"], read["key"]), _Entry(read["value"], read["tensors"], spent)


def _stored(value: Any, tensors: dict[str, Tensor]) -> Any:
    """A result with names in place of its tensors, which are put into `tensors`. A dict is marked as one, so that none
    is taken for a tensor's name."""
    match value:
        case Tensor():
            name = str(len(tensors))
            tensor = value.detach().cpu().contiguous()
            others = {other.untyped_storage().data_ptr() for other in tensors.values()}
            tensors[name] = tensor.clone() if tensor.untyped_storage().data_ptr() in others else tensor
            return {"tensor": name, "device": str(value.device)}
        case list():
            return [_stored(item, tensors) for item in value]
        case dict():
            return {"dict": {key: _stored(item, tensors) for key, item in value.items()}}
    return value


def _restored(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    match value:
        case list():
            return [_restored(item, tensors) for item in value]
        case {"tensor": name, "device": device}:
            return tensors[name].to(_present(device))
        case {"dict": items}:
            return {key: _restored(item, tensors) for key, item in items.items()}
    return value


def _present(device: str) -> torch.device:
    """The device, or the CPU where a run that went on elsewhere has none like it."""
    wanted = torch.device(device)
    missing = wanted.type == "cuda" and (wanted.index or 0) >= torch.cuda.device_count()
    return torch.device("cpu") if missing else wanted
